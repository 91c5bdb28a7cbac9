#!/usr/bin/env bash
# All checks: lint, format, types, then pytest. Arguments go to pytest, with paths relative to the repository:
#   launch/test.sh                  everything, about 12 minutes on two cores; what continuous integration runs
#   launch/test.sh --fast           without what is slow, starts several processes, Ray or a browser: 3 minutes
#   launch/test.sh tests/test_objectives.py -k sdpo
#   launch/test.sh --faults         damaged files, bad input, killed commands: a quarter of an hour; nightly
#   launch/test.sh --cluster        what needs root, several hosts and minutes: see launch/test_cluster.sh
set -euo pipefail

if [[ "${1:-}" == --cluster ]]; then
    shift
    exec "$(dirname -- "${BASH_SOURCE[0]}")/test_cluster.sh" "$@"
fi

# shellcheck source=launch/setup_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_env.sh"

dmpo_setup dev,quant,bench,track,serve
dmpo_runtime
export HF_HUB_OFFLINE=1 # tests make their own tiny models: one that reaches for the network is wrong
cd "$DMPO_ROOT"

ruff check
ruff format --check
pyrefly check
two_processes=(--numprocesses 2 --dist loadfile) # integration tests in one of them: tests/conftest.py
if [[ "${1:-}" == --fast ]]; then
    shift
    set -- "${two_processes[@]}" -m "not slow and not integration and not cluster and not faults" "$@"
elif [[ "${1:-}" == --faults ]]; then
    shift
    set -- -m faults tests/faults tests/integration "$@"
elif [[ $# -eq 0 ]]; then
    set -- "${two_processes[@]}"
fi
python -m pytest "$@"
