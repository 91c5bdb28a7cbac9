#!/usr/bin/env bash
# Rendered by `dmpo submit train --to ray`, dmpo_dist 0.1.0: what the driver runs on the Ray cluster.
set -euo pipefail
config="$(dirname -- "${BASH_SOURCE[0]}")/config.yaml"

# Waits for the nodes, then checks that they run our version and see the data.
python -m dmpo_dist.submit.ready --config "$config" --seconds 600 \
    --versions dmpo_dist=0.1.0 ray=2.60.0 \
    --path /shared/ml/data

resume=()
exec python -m dmpo_dist train --config "$config" "${resume[@]}"
