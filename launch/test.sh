#!/usr/bin/env bash
# All checks: lint, format, types, then pytest. Arguments go to pytest, with paths relative to the repository:
#   launch/test.sh                  launch/test.sh tests/test_objectives.py -k sdpo          launch/test.sh -m "not integration"
#   launch/test.sh --cluster        what needs root, several hosts and minutes: see launch/test_cluster.sh
set -euo pipefail

if [[ "${1:-}" == --cluster ]]; then
    shift
    exec "$(dirname -- "${BASH_SOURCE[0]}")/test_cluster.sh" "$@"
fi

# shellcheck source=launch/setup_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_env.sh"

dmpo_setup dev,quant,bench,track
dmpo_runtime
export HF_HUB_OFFLINE=1 # tests make their own tiny models: one that reaches for the network is wrong
cd "$DMPO_ROOT"

ruff check
ruff format --check
pyrefly check
if [[ $# -eq 0 ]]; then # everything: two processes, integration tests in one of them
    set -- --numprocesses 2 --dist loadgroup
fi
python -m pytest "$@"
