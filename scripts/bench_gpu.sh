#!/usr/bin/env bash
# All tables that need a GPU, by one command, in under 9 minutes on one A100 or H100 / H200.
#
#   bash scripts/bench_gpu.sh [FOLDER]               default: runs/bench_gpu
#   bash scripts/bench_gpu.sh --rehearse [FOLDER]    the same stages on the CPU with tiny shapes: checks this script only
#
# It has not run on a GPU yet: only the rehearsal has. First every GPU kernel is compared with fp64 and with the plain
# torch functions; if one is wrong, nothing is measured. Then layers of Llama-2-7B with random weights: no network, no
# files of a model. A stage that overruns its time is cut off, and the next one begins; the exit code is then 1.
#
# Uses the `python` in PATH (or PYTHON), with the packages of pyproject.toml and its extra `dev`. FOLDER gets report.md
# (all tables), one *.json per stage, tests.log and errors.log.

set -uo pipefail
CDPATH="" cd -P "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

device=cuda
if [[ "${1:-}" == --rehearse ]]; then
    device=cpu
    shift
fi
folder="${1:-runs/bench_gpu}"
python="${PYTHON:-python}"
end=$((SECONDS + 525))
unfinished=0
mkdir -p "$folder"
folder="$(cd "$folder" && pwd)"
: >"$folder/errors.log"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

if [[ $device == cuda ]] && ! "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
    echo "error: torch of $python sees no CUDA device; --rehearse runs the stages on the CPU." >&2
    exit 1
fi

# stage SECONDS NAME COMMAND...: its standard output goes into the report.
stage() {
    local limit=$1 name=$2 left=$((end - SECONDS)) begun=$SECONDS status
    shift 2
    if ((left < 10)); then
        printf '\n## %s\n\nnot run: the time is up\n' "$name" | tee -a "$folder/report.md"
        unfinished=1
        return 1
    fi
    printf '\n## %s\n\n`%s`\n' "$name" "$*" | tee -a "$folder/report.md"
    printf '\n## %s\n' "$name" >>"$folder/errors.log"
    limit=$((limit < left ? limit : left))
    if [[ $(type -t "$1") == function ]]; then
        "$@"
    else
        timeout --kill-after=5 "$limit" "$@"
    fi 2>>"$folder/errors.log" | tee -a "$folder/report.md"
    status=${PIPESTATUS[0]}
    ((status == 0)) || unfinished=1
    printf '\n%s after %s s\n' "$( ((status == 0)) && echo done || echo "FAILED (exit code $status, see errors.log)")" \
        "$((SECONDS - begun))" | tee -a "$folder/report.md"
    return "$status"
}

# The cases of tests/unit/kernels/triton_cases.py in processes side by side: most of the time the compiler works.
test_kernels() {
    local selections=("dtype0" "dtype1" "not dtype0 and not dtype1") interpret=0 running=() failed=0
    if [[ $device == cpu ]]; then
        selections=("ties or taken")
        interpret=1
    fi
    for number in "${!selections[@]}"; do
        TRITON_INTERPRET=$interpret timeout --kill-after=5 120 "$python" -m pytest -q --noconftest -p no:cacheprovider \
            -W ignore tests/unit/kernels/triton_cases.py -k "${selections[number]}" >"$folder/tests$number.log" 2>&1 &
        running+=($!)
    done
    for process in "${running[@]}"; do
        wait "$process" || failed=1
    done
    cat "$folder"/tests[0-9].log >"$folder/tests.log"
    rm "$folder"/tests[0-9].log
    return $failed
}

# The four cases side by side, since nothing is timed: each row has a process of its own, which takes long to start.
memory_tables() {
    local running=() failed=0 case
    for case in "bfloat16" "bfloat16 --checkpointing" "nf4" "nf4 --checkpointing"; do
        # shellcheck disable=SC2086
        timeout --kill-after=5 "$limit" "$python" scripts/bench_memory.py "${step[@]}" "${one[@]:0:2}" \
            --densities "$density" --dtype $case --rows "${memory_rows[@]}" --json "$folder/memory_${case// --/_}.json" \
            >"$folder/memory_${case// --/_}.md" &
        running+=($!)
    done
    for process in "${running[@]}"; do
        wait "$process" || failed=1
    done
    cat "$folder"/memory_*.md
    rm "$folder"/memory_*.md
    return $failed
}

printf '# GPU benchmarks\n\n%s\n' "$(date -u +%F)" | tee "$folder/report.md"
if [[ $device == cuda ]]; then
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee -a "$folder/report.md"
    "$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)' |
        tee -a "$folder/report.md"
fi
if test_kernels; then
    printf '\nGPU kernels against fp64 and torch, one line per process:\n\n%s\n' "$(grep passed "$folder/tests.log")" |
        tee -a "$folder/report.md"
else
    printf '\nGPU kernels against fp64: FAILED\n' | tee -a "$folder/report.md"
    tail -40 "$folder/tests.log"
    exit 1
fi

if [[ $device == cuda ]]; then
    kernels=(--device cuda --dtype bfloat16)
    step=(--device cuda --shape llama-2-7b --layers 2)
    one=(--tokens 1x2048)
    four=(--tokens 4x2048)
    all=(--densities 0.001 0.003 0.006 0.0125 0.023)
    density=0.006
    blocks='[16,16]'
    memory_rows=(sparta sft_ag sft_ma lora_0.1)
else
    kernels=(--device cpu --dtype float32 --shapes 64x64 --tokens 32 --densities 0.01 --optimizer-weights 1000 --rounds 1)
    step=(--device cpu --shape tiny --layers 1)
    one=(--tokens 1x16 --rounds 1)
    four=(--tokens 4x16 --rounds 1)
    all=(--densities 0.02 0.05)
    density=0.02
    blocks='[4,4]'
    memory_rows=(sparta lora_0.1)
fi
methods=(--rows floor sparta sft_ag sft_ma lora_0 lora_0.1)
stage 70 "Kernels" "$python" scripts/bench_kernels.py "${kernels[@]}" --json "$folder/kernels.json"
stage 30 "Crossover of the two paths of the gradient" "$python" scripts/bench_kernels.py "${kernels[@]}" --crossover
stage 80 "Step, bf16, micro batch 1" "$python" scripts/bench_step.py "${step[@]}" "${one[@]}" "${all[@]}" \
    --dtype bfloat16 --json "$folder/step_bf16_1.json"
stage 60 "Step, NF4, micro batch 1" "$python" scripts/bench_step.py "${step[@]}" "${one[@]}" "${all[@]}" \
    "${methods[@]}" --dtype nf4 --json "$folder/step_nf4_1.json"
stage 50 "Step, 16 x 16 blocks at the largest density" "$python" scripts/bench_step.py "${step[@]}" "${one[@]}" \
    "${methods[@]}" --densities "${all[-1]}" --dtype bfloat16 --set "block_size=$blocks" \
    --json "$folder/step_blocks.json"
stage 60 "Step, bf16, micro batch 4" "$python" scripts/bench_step.py "${step[@]}" "${four[@]}" "${all[@]}" \
    "${methods[@]}" --dtype bfloat16 --json "$folder/step_bf16_4.json"
stage 80 "Memory" memory_tables
stage 50 "Step, NF4, micro batch 4" "$python" scripts/bench_step.py "${step[@]}" "${four[@]}" "${all[@]}" \
    "${methods[@]}" --dtype nf4 --json "$folder/step_nf4_4.json"
echo
echo "All of it is in $folder/report.md"
exit "$unfinished"
