#!/usr/bin/env bash
# A pretrained language model on ML-100K from 100 examples: zero-shot, SFT, SFT continued, DMPO, and a report of all four.
# Sets up the environment, brings model and data from the package index (no hub is needed), and takes some 25 minutes in
# all on two quiet cores. Arguments:
#
#   DMPO_ACCEPT_TERMS=1 launch/pretrained.sh [MODEL [FOLDER]]      smollm2-135m and runs/pretrained unless given
#
# DMPO_ACCEPT_TERMS=1 says that you accept the terms of ML-100K (GroupLens: research use, to be cited) and of the model,
# which are shown; without it the script stops there.
set -euo pipefail

# shellcheck source=launch/setup_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_env.sh"

dmpo_setup
dmpo_runtime
model="${1:-smollm2-135m}" folder="${2:-runs/pretrained}"
accept=()
if [[ "${DMPO_ACCEPT_TERMS:-}" == 1 ]]; then
    accept=(--accept-terms)
fi

run() { # prints a command, then runs it
    echo "+ dmpo $*"
    dmpo "$@"
}

stage() { # VERB NAME START [OVERRIDES]: a training stage into $folder/NAME, skipped when it is done, resumed when begun
    local verb="$1" name="$2" start="$3" resume=()
    shift 3
    if [[ -e "$folder/$name/model" ]]; then
        echo "dmpo: $folder/$name is done"
        return
    fi
    if [[ -e "$folder/$name" ]]; then
        resume=(--resume)
    fi
    run "$verb" -c pretrained_few_shot model.path="$start" data.path="$folder/data" output_dir="$folder/$name" \
        "$@" "${resume[@]}"
}

run models fetch "$model" "${accept[@]}"
if [[ ! -e "$folder/download/ml-100k-recbole" ]]; then
    run data download ml-100k "$folder/download" --from-wheel "${accept[@]}"
fi
if [[ ! -e "$folder/data" ]]; then
    run data prepare -c pretrained_few_shot data.source.path="$folder/download/ml-100k-recbole" \
        data.path="$folder/data" data.max_test_users=100
fi

stage sft sft "$model"
stage sft sft_continued "$folder/sft/model" sft.learning_rate=5e-5
stage train dmpo "$folder/sft/model"
if [[ ! -e "$folder/evaluation/evaluation.json" ]]; then
    resume=()
    if [[ -e "$folder/evaluation" ]]; then
        resume=(--resume)
    fi
    run evaluate -c pretrained_few_shot data.path="$folder/data" output_dir="$folder/evaluation" \
        -m zero_shot="$model" -m sft="$folder/sft/model" -m sft_continued="$folder/sft_continued/model" \
        -m dmpo="$folder/dmpo/model" --against sft_continued "${resume[@]}"
fi
if [[ ! -e "$folder/explanation" ]]; then
    run explain -c pretrained_few_shot -m "$folder/dmpo/model" data.path="$folder/data" \
        --users 2 --faithfulness --output "$folder/explanation"
fi
run report "$folder"
