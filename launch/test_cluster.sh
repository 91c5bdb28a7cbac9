#!/usr/bin/env bash
# The cluster tests: a real Slurm with two nodes, two hosts in network namespaces with one killed, the Ray Jobs API, the
# Kubernetes manifests with planted faults, docker/compose.yaml where a container engine runs, shell scripts and Dockerfiles.
# Installs what it can; what this machine lacks is skipped with its reason. Takes about a quarter of an hour. Arguments go
# to pytest.
#   launch/test.sh --cluster
#   DMPO_KUBERAY_SCHEMAS   folder with KubeRay's CRDs (ray-project/kuberay, config/crd/bases) for the RayJob's schema
#   DMPO_BUILD_IMAGE=1     also build docker/Dockerfile.cpu by buildah and run the quickstart in it (another quarter of an hour);
#                          where an engine answers docker, it gets the image for docker/compose.yaml
set -euo pipefail

# shellcheck source=launch/setup_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_env.sh"

# Debian packages by what they bring; nothing is installed that is there.
packages=()
command -v slurmctld >/dev/null && command -v sbatch >/dev/null || packages+=(slurm-wlm slurm-client)
command -v munged >/dev/null || packages+=(munge)
command -v ip >/dev/null || packages+=(iproute2)
if [[ -n "${DMPO_BUILD_IMAGE:-}" ]]; then
    command -v buildah >/dev/null || packages+=(buildah)
    command -v mmdebstrap >/dev/null || packages+=(mmdebstrap)
fi
if ((${#packages[@]})); then
    if ((EUID == 0)) && command -v apt-get >/dev/null; then
        echo "dmpo: installing ${packages[*]}"
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" ||
            echo "dmpo: that failed; the tests that need ${packages[*]} are skipped"
    else
        echo "dmpo: without root and apt-get the tests that need ${packages[*]} are skipped"
    fi
fi

dmpo_setup dev,quant,bench,track,submit
dmpo_runtime
export HF_HUB_OFFLINE=1
cd "$DMPO_ROOT"

shellcheck launch/*.sh docker/*.sh .ci/run
if command -v hadolint >/dev/null; then
    hadolint docker/Dockerfile docker/Dockerfile.cpu
else
    echo "dmpo: no hadolint for this machine; the Dockerfiles are not linted"
fi
if [[ -n "${DMPO_BUILD_IMAGE:-}" ]]; then
    if docker version >/dev/null 2>&1; then
        archive="$(mktemp -d)/dmpo-cpu.tar"
        docker/build_cpu_image.sh --run --save "$archive"
        docker load --input "$archive"
        rm -r "$(dirname "$archive")"
    else
        docker/build_cpu_image.sh --run
    fi
fi
# -rs: the reason of each skip. The last two are part of the ordinary suite as well.
python -m pytest -rs -m "cluster or not cluster" tests/integration/test_cluster_slurm.py \
    tests/integration/test_cluster_hosts.py tests/integration/test_cluster_compose.py tests/integration/test_submit_ray.py \
    tests/test_submit.py "$@"
