#!/usr/bin/env bash
# Builds docker/Dockerfile.cpu without Docker and without pulling a base: on a minimal Debian 12 that mmdebstrap makes, by
# buildah. Needs root, buildah and mmdebstrap (Debian: apt-get install buildah mmdebstrap). Then, for the quickstart inside:
#   docker/build_cpu_image.sh --run
#
#   docker/build_cpu_image.sh [--run] [--save FILE] [-- OPTIONS OF buildah bud]
#   --save FILE        also write the image as an archive, for an engine elsewhere: docker load -i FILE, podman load -i FILE
#   DMPO_IMAGE_STORE   folder for the root file system and the images (default: /var/tmp/dmpo-images)
#
# Behind a mirror, hand this machine's pip and apt settings in from outside, so that none ends up in the image (of a mount
# only an empty file or folder stays):
#   docker/build_cpu_image.sh -- -v /etc/pip.conf:/etc/pip.conf:ro -v /etc/apt/apt.conf.d/99mirror:/etc/apt/apt.conf.d/99mirror:ro
# What those settings name needs a mount too: folders of wheels, a constraints file, the mirror's certificate. Mount the last
# outside /etc/ssl/certs, where installing ca-certificates writes, and name it in pip.conf: cert = /mnt/ca.crt
set -euo pipefail

die() {
    echo "dmpo: $*" >&2
    exit 1
}

store="${DMPO_IMAGE_STORE:-/var/tmp/dmpo-images}"
run="" archive=""
while [[ "${1:-}" == --?* ]]; do
    case "$1" in
    --run) run=yes ;;
    --save)
        [[ -n "${2:-}" ]] || die "--save needs the file to write"
        archive="$(realpath -m -- "$2")"
        shift
        ;;
    *) die "unknown option $1; options of buildah bud come after --" ;;
    esac
    shift
done
if [[ "${1:-}" == -- ]]; then
    shift
fi
for tool in buildah mmdebstrap; do
    command -v "$tool" >/dev/null ||
        die "$tool is not installed; on Debian and Ubuntu: sudo apt-get install buildah mmdebstrap"
done
((EUID == 0)) || die "chroot isolation needs root: sudo $0"

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
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
if [[ -n "$archive" ]]; then
    rm -f "$archive" # an archive is added to, not replaced
    buildah_here push dmpo:cpu "docker-archive:$archive:dmpo:cpu"
    echo "dmpo: saved in $archive"
fi

if [[ -n "$run" ]]; then
    container="$(buildah_here from --pull-never localhost/dmpo:cpu)"
    trap 'buildah_here rm "$container" >/dev/null' EXIT
    echo "dmpo: the quickstart inside, in container $container"
    buildah_here run --isolation chroot --network host "$container" -- launch/quickstart.sh
fi
