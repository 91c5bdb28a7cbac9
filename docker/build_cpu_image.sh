#!/usr/bin/env bash
# Builds docker/Dockerfile.cpu without Docker and without pulling a base: on a minimal Debian 12 that mmdebstrap makes, by
# buildah. Needs root, buildah and mmdebstrap (Debian: apt-get install buildah mmdebstrap). Then, for the quickstart inside:
#   docker/build_cpu_image.sh --run
#
#   docker/build_cpu_image.sh [--run] [-- OPTIONS OF buildah bud]
#   DMPO_IMAGE_STORE   folder for the root file system and the images (default: /var/tmp/dmpo-images)
#
# Behind a mirror, hand this machine's pip and apt settings in from outside, so that none ends up in the image:
#   docker/build_cpu_image.sh -- -v /etc/pip.conf:/etc/pip.conf:ro -v /etc/apt/apt.conf.d/99mirror:/etc/apt/apt.conf.d/99mirror:ro
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
store="${DMPO_IMAGE_STORE:-/var/tmp/dmpo-images}"
run=""
if [[ "${1:-}" == --run ]]; then
    run=yes
    shift
fi
if [[ "${1:-}" == -- ]]; then
    shift
fi
for tool in buildah mmdebstrap; do
    command -v "$tool" >/dev/null || {
        echo "dmpo: $tool is not installed; on Debian and Ubuntu: sudo apt-get install buildah mmdebstrap" >&2
        exit 1
    }
done
((EUID == 0)) || {
    echo "dmpo: chroot isolation needs root: sudo $0" >&2
    exit 1
}

mkdir -p "$store/base"
# vfs and chroot: neither overlay mounts nor namespaces are needed, so that it also works inside a container.
buildah_here() { buildah --root "$store/storage" --runroot "$store/run" --storage-driver vfs "$@"; }

if ! buildah_here inspect --type image dmpo-base >/dev/null 2>&1; then
    echo "dmpo: a minimal Debian 12 as the base"
    if [[ ! -f "$store/base/root.tar" ]]; then
        mmdebstrap --variant=minbase --format=tar --quiet bookworm "$store/base/root.tar.part"
        mv "$store/base/root.tar.part" "$store/base/root.tar"
    fi
    buildah_here bud --isolation chroot -t dmpo-base -f - "$store/base" <<<$'FROM scratch\nADD root.tar /'
fi
echo "dmpo: docker/Dockerfile.cpu on it"
buildah_here bud --isolation chroot --network host --format docker --pull-never --build-arg BASE=localhost/dmpo-base \
    -f docker/Dockerfile.cpu -t dmpo:cpu "$@" .
buildah_here images

if [[ -n "$run" ]]; then
    container="$(buildah_here from --pull-never localhost/dmpo:cpu)"
    trap 'buildah_here rm "$container" >/dev/null' EXIT
    echo "dmpo: the quickstart inside, in container $container"
    buildah_here run --isolation chroot --network host "$container" -- launch/quickstart.sh
fi
