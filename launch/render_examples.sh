#!/usr/bin/env bash
# Makes the worked examples of `dmpo submit` below launch/ anew: one run, for each kind of cluster. Edit this, not them.
#   launch/render_examples.sh [FOLDER]     FOLDER gets launch/slurm, launch/ray, launch/kubernetes; default: this checkout
set -euo pipefail

root="${1:-$(dirname -- "${BASH_SOURCE[0]}")/..}"
cd -- "$root"
python -c 'import dmpo_dist' # before the old ones are gone
rm -rf launch/slurm launch/ray launch/kubernetes

# Sixteen GPUs on two nodes; data and runs on storage that all nodes see.
run=(-c pretrained_lora model.path=Qwen/Qwen3-0.6B cluster.workers=16 submit.nodes=2 submit.gpus_per_node=8
    submit.cpus_per_node=64 'submit.env={NCCL_SOCKET_IFNAME: eth0, GLOO_SOCKET_IFNAME: eth0}')
slurm=(--to slurm --render-only "${run[@]}" data.path=/shared/ml/data output_dir=/shared/ml/dmpo submit.name=ml-dmpo
    submit.slurm.partition=gpu submit.slurm.account=ranking 'submit.slurm.setup=[source /shared/venv/bin/activate]')

python -m dmpo_dist submit train "${slurm[@]}" submit.folder=launch/slurm/ray
python -m dmpo_dist submit train "${slurm[@]}" submit.folder=launch/slurm/torchrun submit.slurm.launcher=torchrun
python -m dmpo_dist submit train --to ray --render-only "${run[@]}" data.path=/shared/ml/data output_dir=/shared/ml/dmpo \
    submit.name=ml-dmpo submit.folder=launch/ray submit.ray.address=http://head:8265
python -m dmpo_dist submit train --to kubernetes --render-only "${run[@]}" data.path=/checkpoints/ml/data \
    output_dir=/checkpoints/ml/dmpo submit.name=ml-dmpo submit.folder=launch/kubernetes \
    submit.kubernetes.image=registry.example.com/dmpo:cuda submit.kubernetes.volume_claim=dmpo-checkpoints \
    submit.kubernetes.secret=dmpo-secrets submit.kubernetes.namespace=ranking
