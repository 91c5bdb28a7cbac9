#!/usr/bin/env bash
# All that is to be seen on one GPU, in one call of some fifteen minutes at most, without Ray or network:
#   tests/gpu/all.sh OUT [PART...]      parts: fp32 trl offload mfu plan checks prove verl; all in this order by default
# Each part has a time limit of its own, and one that fails or is cut does not stop the others. OUT gets their results
# (JSON as it comes, and a log each); the last lines say how each part ended. PYTHON names the interpreter. DEVICE=cpu
# tries the script without a GPU on tiny models, whose figures mean nothing.
set -uo pipefail

out=${1:?tests/gpu/all.sh OUT [PART...]: name a folder for the results}
shift
parts=("$@")
[[ $# -gt 0 ]] || parts=(fp32 trl offload mfu plan checks prove verl)
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$(dirname -- "${BASH_SOURCE[0]}")/../.." || exit 2
export PYTHONPATH=.:tests:tests/gpu${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python}
device=${DEVICE:-cuda}
rows=(32 8) # groups in a row
shape=(--prompt 256 --negatives 7 --vocab 32000 --rounds 3)
if [[ $device == cpu ]]; then
    rows=(2 1)
    shape=(--prompt 32 --negatives 2 --vocab 512 --rounds 1)
fi

run_part() { # run_part NAME
    local pytest=("$python" -m pytest -q -p no:cacheprovider -m gpu tests/gpu)
    local compared=("$python" -m dmpo_dist bench speed --device "$device" "${shape[@]}")
    case $1 in
    fp32) timeout 90 "${pytest[@]}" -x -k float32 ;;
    trl) timeout 150 "${compared[@]}" --json "$out/speed.json" ;;
    offload) timeout 120 "$python" tests/gpu/plan.py --device "$device" --only offload --json "$out/offload.json" ;;
    mfu) timeout 120 "$python" tests/gpu/mfu.py --device "$device" --groups "${rows[@]}" --json "$out/mfu.json" ;;
    plan) timeout 150 "$python" tests/gpu/plan.py --device "$device" --json "$out/plan.json" ;;
    checks) timeout 150 "${pytest[@]}" ;;
    prove) timeout 150 "$python" tests/gpu/prove.py --device "$device" --jobs 12 --no-times --json "$out/prove.json" ;;
    verl) timeout 90 "$python" tests/gpu/shared_prefix.py --device "$device" --groups "${rows[@]:1}" --steps 2 ;;
    *) echo "no such part" && return 2 ;;
    esac
}

ended=()
for part in "${parts[@]}"; do
    began=$SECONDS
    run_part "$part" >"$out/$part.log" 2>&1
    code=$?
    tail -n 12 "$out/$part.log"
    ended+=("$part: exit code $code after $((SECONDS - began)) s")
    echo "== ${ended[-1]}"
done
printf '%s\n' "${ended[@]}"
