#!/usr/bin/env bash
# The whole system on the embedded model and data, from a fresh clone, with no network after the installation:
#
#   1. .venv with the pinned dependencies
#   2. SFT-MA over an NF4 base on two real ZeRO-3 ranks          -> runs/quickstart
#   3. the dense baseline, every weight trained, the same way    -> runs/quickstart_full
#   4. both merged models in plain transformers, without this project: they load and have the loss of their runs
#   5. both runs in one table
#
# Repeated, it begins anew in the same folders. Arguments go to both runs: scripts/quickstart.sh --set train.max_steps=50
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

phase() {
    printf '\n== %s  [%d s so far]\n' "$1" "$SECONDS"
}

# Two ranks on the CPU; of GPUs as many as share the 32 samples of a step (4 micro batches of 8) evenly.
num_ranks=2
if nvidia-smi -L >/dev/null 2>&1; then
    num_ranks="$(python -c 'import torch; print({0: 2, 1: 1, 2: 2, 3: 2}.get(torch.cuda.device_count(), 4))')"
fi

train() {
    local name="$1" config="$2" port
    shift 2
    # deepspeed's own port is the same for every run: a free one lets several share a machine.
    port="$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')"
    deepspeed --num_accelerators "$num_ranks" --master_port "$port" --log_level warning \
        launcher/train.py --config "$config" --set "train.output_dir=runs/$name" --set train.overwrite=true "$@"
}

phase "SFT-MA over an NF4 base: $num_ranks ranks"
train quickstart zero3_sft_ma.json "$@"

phase "Dense baseline: every weight, $num_ranks ranks"
train quickstart_full zero3_full.json "$@"

phase "The merged models in plain transformers"
python scripts/check_merged.py runs/quickstart runs/quickstart_full

phase "Files in $PWD"
echo "runs/quickstart/adapter/     the trained deltas"
echo "runs/quickstart/merged/      the dense model, for AutoModelForCausalLM.from_pretrained"
echo "runs/quickstart/metrics.jsonl, resolved_config.json; the same for runs/quickstart_full"

phase "SFT-MA beside full fine-tuning (held-out loss)"
sparse-ds report runs/quickstart runs/quickstart_full
