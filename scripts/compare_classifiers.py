"""SpaRTA against LoRA with equally many trained weights, and against the majority class: accuracy and Matthews.

    python scripts/compare_classifiers.py --model MODEL_FOLDER --output runs/classifiers \\
        --task cola train.jsonl heldout.jsonl --task sst2 train.jsonl heldout.jsonl

SpaRTA runs through launcher/train.py on two ranks, LoRA through scripts/lora_classifier.py; both in fp32, with the same
batches in the same order, the same schedule, the same head before training, the same targets (all linear layers). Each
method tries three learning rates, a factor of the root of 10 apart, with the first seed and judges them by Matthews on
the last rows of the training data, which no run learns from. Only then are the held-out rows looked at, with every
seed. A run that is finished is kept in the output folder and not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MIDDLE_RATES = {"SpaRTA": 3.2e-3, "LoRA (peft)": 3.2e-3}
ROOT_OF_10 = 10**0.5


class Job(NamedTuple):
    """One run."""

    task: str
    method: str
    learning_rate: float
    seed: int
    heldout: str
    """`select`: the last training rows; `heldout`: the held-out ones."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a Llama checkpoint")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--task", nargs=3, action="append", required=True, metavar=("NAME", "TRAIN", "HELDOUT"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32, help="samples a step")
    parser.add_argument("--sequence-length", type=int, default=64)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--select-rows", type=int, default=500, help="last rows of the training data: for the rate")
    parser.add_argument("--heldout-rows", type=int, default=1000, help="at most so many are used")
    parser.add_argument(
        "--rate-steps",
        type=int,
        nargs="+",
        default=[-1, 0, 1],
        help="learning rates: the method's own times the root of 10 to these powers; with one nothing is selected",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    arguments = parser.parse_args()
    lines = ["| task | method | trained weights | learning rate | accuracy | Matthews |", "|---|---|--:|--:|--:|--:|"]
    for task, train, heldout in arguments.task:
        split(arguments, task, Path(train), Path(heldout))
        lines.append(majority_line(arguments, task))
        lines += [method_line(arguments, task, method) for method in MIDDLE_RATES]
    print("\n".join(lines))


def split(arguments: argparse.Namespace, task: str, train: Path, heldout: Path) -> None:
    """train.jsonl, select.jsonl and heldout.jsonl of a task."""
    folder = arguments.output / task
    folder.mkdir(parents=True, exist_ok=True)
    rows = train.read_text(encoding="utf-8").splitlines(keepends=True)
    held = heldout.read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(rows[: -arguments.select_rows]), encoding="utf-8")
    (folder / "select.jsonl").write_text("".join(rows[-arguments.select_rows :]), encoding="utf-8")
    (folder / "heldout.jsonl").write_text("".join(held[: arguments.heldout_rows]), encoding="utf-8")


def majority_line(arguments: argparse.Namespace, task: str) -> str:
    """The label that the training data has most, given to every held-out row."""
    labels = {}
    for name in ("train", "heldout"):
        lines = (arguments.output / task / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        labels[name] = [str(json.loads(line)["label"]) for line in lines]
    majority = statistics.mode(labels["train"])
    accuracy = labels["heldout"].count(majority) / len(labels["heldout"])
    return f"| {task} | majority class | 0 | | {accuracy:.3f} | 0.000 |"


def method_line(arguments: argparse.Namespace, task: str, method: str) -> str:
    rates = [float(f"{MIDDLE_RATES[method] * ROOT_OF_10**step:.1e}") for step in arguments.rate_steps]
    best = rates[0]
    if len(rates) > 1:
        found = {rate: run(arguments, Job(task, method, rate, arguments.seeds[0], "select")) for rate in rates}
        best = max(rates, key=lambda rate: found[rate]["heldout_scores_after"]["matthews"])
    summaries = [run(arguments, Job(task, method, best, seed, "heldout")) for seed in arguments.seeds]
    shown = []
    for name in ("accuracy", "matthews"):
        values = [summary["heldout_scores_after"][name] for summary in summaries]
        shown.append(f"{statistics.mean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})")
    return f"| {task} | {method} | {summaries[0]['num_trained_weights']:,} | {best:g} | {' | '.join(shown)} |"


def run(arguments: argparse.Namespace, job: Job) -> dict[str, Any]:
    """The summary of one run, made if it is not there yet."""
    name = f"{job.method.split()[0]}_lr{job.learning_rate:.1e}_seed{job.seed}_{job.heldout}"
    folder = arguments.output / job.task / name
    result = folder.parent / f"{name}.json"
    if not result.exists():
        command = sparse_command(arguments, job, folder) if job.method == "SpaRTA" else lora_command(arguments, job)
        log = folder.parent / f"{name}.log"
        with log.open("w", encoding="utf-8") as file:
            subprocess.run(command, check=True, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
        source = folder / "metrics.jsonl" if job.method == "SpaRTA" else log
        result.write_text(source.read_text(encoding="utf-8").splitlines()[-1], encoding="utf-8")
        print(
            f"{job.task}, {name}: {json.loads(result.read_text(encoding='utf-8'))['heldout_scores_after']}", flush=True
        )
    summary: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return summary


def sparse_command(arguments: argparse.Namespace, job: Job, folder: Path) -> list[str]:
    """One run of launcher/train.py on two ranks."""
    data = (arguments.output / job.task).resolve()
    settings = {
        "model.name_or_path": arguments.model.resolve(),
        "model.task": "sequence_classification",
        "model.quantization": "none",
        "model.dtype": "float32",
        "data.train": data / "train.jsonl",
        "data.eval": data / f"{job.heldout}.jsonl",
        "data.sequence_length": arguments.sequence_length,
        "method.name": "sparta",
        "method.density": arguments.density,
        "optimizer.learning_rate": job.learning_rate,
        "train.output_dir": folder.resolve(),
        "train.overwrite": "true",
        "train.max_steps": arguments.steps,
        "train.micro_batch_size": arguments.batch // 2,
        "train.global_batch_size": arguments.batch,
        "train.eval_micro_batch_size": arguments.batch,
        "train.cpu_threads": 1,
        "train.seed": job.seed,
        "monitor.progress_bar": "false",
        "export.merged": "false",
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(ROOT / "launcher" / "train.py"), "--config", "zero3_full"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    return command


def lora_command(arguments: argparse.Namespace, job: Job) -> list[str]:
    """One run of scripts/lora_classifier.py."""
    data = arguments.output / job.task
    options = {
        "model": arguments.model,
        "train": data / "train.jsonl",
        "heldout": data / f"{job.heldout}.jsonl",
        "learning-rate": job.learning_rate,
        "density": arguments.density,
        "steps": arguments.steps,
        "batch": arguments.batch,
        "sequence-length": arguments.sequence_length,
        "seed": job.seed,
    }
    command = [sys.executable, str(ROOT / "scripts" / "lora_classifier.py")]
    for name, value in options.items():
        command += [f"--{name}", str(value.resolve() if isinstance(value, Path) else value)]
    return command


if __name__ == "__main__":
    main()
