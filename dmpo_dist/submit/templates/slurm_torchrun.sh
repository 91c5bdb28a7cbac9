# Ranks without Ray: one torchrun on each node starts its share.
# shellcheck disable=SC2016 # expanded on the nodes
srun --ntasks-per-node=1 --kill-on-bad-exit=1 \
    bash -c 'exec python -m torch.distributed.run --node-rank="$SLURM_NODEID" "$@"' torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node={{ ranks_per_node }} --master-addr="$head_address" --master-port="$port" \
    -m dmpo_dist {{ job.verb }} --config "$config" "${resume[@]}" &
