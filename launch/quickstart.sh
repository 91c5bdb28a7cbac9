#!/usr/bin/env bash
# From a fresh checkout to a trained and evaluated recommender: sets up the environment, then `dmpo quickstart "$@"`.
set -euo pipefail

# shellcheck source=launch/setup_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_env.sh"

dmpo_setup
dmpo_runtime
exec dmpo quickstart "$@"
