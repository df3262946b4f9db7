"""All methods on one model and one text, with equally many trained weights: a table of held-out losses.

    python scripts/compare_methods.py --model MODEL_FOLDER --text TEXT_FILE --output runs/compare

The first 85 % of the text's lines train, the rest is held out. Every method runs with each learning rate of a grid of
its own (three, a factor of the root of 10 apart) with the first seed. If the best is at an edge of the grid, the grid
is extended there by one, as often as needed. The best learning rate then runs with the other seeds. Nothing else is
tuned: density, S, gamma and alpha are the defaults for all. Sparse methods and `full` run through launcher/train.py,
over an NF4 base (`full`: bf16), LoRA through scripts/lora_baseline.py over the same NF4 weights; all see the same
batches.

`--methods` also knows some methods with blocks as the active unit (`method.block_size`); a `--density` of which every
matrix has a whole number of blocks gives them as many trained weights as the others.

A run that is finished is kept in the output folder and not repeated, so the script can be interrupted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ROOT_OF_10 = 10**0.5


class Method(NamedTuple):
    """One line of the table."""

    config: str
    """In configs/; empty: LoRA."""
    middle_rate: float
    """The middle of the grid of learning rates."""
    overrides: dict[str, Any]


GENTLE = {"method.first_drop_fraction": 0.2, "optimizer.age_warmup_steps": 25}
METHODS = {
    "SFT-AG": Method("zero3_sft_ag", 1e-2, {}),
    "SFT-AG, gentle": Method("zero3_sft_ag", 3.2e-3, GENTLE),
    "SFT-MA": Method("zero3_sft_ma", 1e-2, {}),
    "SFT-MA, 10 % of the growth random": Method("zero3_sft_ma", 1e-2, {"method.random_growth_fraction": 0.1}),
    "SpaRTA": Method("zero3_sft_ag", 1e-2, {"method.name": "sparta"}),
    "Fisher": Method("zero3_sft_ag", 1e-2, {"method.name": "fisher"}),
    "accumulated gradient": Method("zero3_sft_ag", 1e-2, {"method.name": "accumulated_gradient"}),
    "LoRA (peft)": Method("", 3e-3, {}),
    **{
        f"{name}, blocks of {rows} x {cols}": Method(config, rate, {**method, "method.block_size": f"[{rows},{cols}]"})
        for rows, cols in ((1, 16), (16, 16))
        for name, config, rate, method in (
            ("SFT-AG", "zero3_sft_ag", 1e-2, {}),
            ("SFT-AG, gentle", "zero3_sft_ag", 3.2e-3, GENTLE),
            ("SFT-MA", "zero3_sft_ma", 1e-2, {}),
            ("SpaRTA", "zero3_sft_ag", 1e-2, {"method.name": "sparta"}),
        )
    },
    "full": Method("zero3_full", 3.2e-4, {}),
}


WITHOUT_BLOCKS = [name for name in METHODS if "blocks" not in name]


class Job(NamedTuple):
    """One run."""

    method: str
    learning_rate: float
    seed: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a Llama checkpoint")
    parser.add_argument("--text", type=Path, required=True, help="plain text")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8, help="samples a step")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=WITHOUT_BLOCKS)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    arguments = parser.parse_args()
    split_text(arguments.text, arguments.output)
    with ThreadPoolExecutor(max_workers=arguments.jobs) as pool:
        best = {method: pool.submit(search, arguments, method) for method in arguments.methods}
        rates = {method: future.result() for method, future in best.items()}
        jobs = [Job(method, rate, seed) for method, rate in rates.items() for seed in arguments.seeds[1:]]
        list(pool.map(lambda job: run(arguments, job), jobs))
    print(table(arguments, rates))


def split_text(text: Path, output: Path) -> None:
    """First 85 % of the lines to train.txt, the rest to heldout.txt."""
    output.mkdir(parents=True, exist_ok=True)
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    cut = int(len(lines) * 0.85)
    (output / "train.txt").write_text("".join(lines[:cut]), encoding="utf-8")
    (output / "heldout.txt").write_text("".join(lines[cut:]), encoding="utf-8")


def search(arguments: argparse.Namespace, method: str) -> float:
    """The best learning rate with the first seed."""
    middle = METHODS[method].middle_rate
    losses: dict[int, float] = {}
    wanted = [-1, 0, 1]
    while wanted:
        for step in wanted:
            job = Job(method, round_rate(middle * ROOT_OF_10**step), arguments.seeds[0])
            losses[step] = run(arguments, job)["heldout_loss_after"]
        best = min(losses, key=lambda step: losses[step])
        wanted = [step for step in (best - 1, best + 1) if step not in losses]
    return round_rate(middle * ROOT_OF_10**best)


def round_rate(rate: float) -> float:
    """Two digits."""
    return float(f"{rate:.1e}")


def run(arguments: argparse.Namespace, job: Job) -> dict[str, Any]:
    """The summary of one run, made if it is not there yet."""
    folder = run_folder(arguments, job)
    result = result_file(arguments, job)
    if not result.exists():
        command = lora_command(arguments, job) if not METHODS[job.method].config else launch_command(arguments, job)
        log = arguments.output / f"{folder.name}.log"
        with log.open("w", encoding="utf-8") as file:
            subprocess.run(command, check=True, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
        if METHODS[job.method].config:
            lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        else:
            lines = log.read_text(encoding="utf-8").splitlines()
        result.write_text(lines[-1], encoding="utf-8")
        print(
            f"{job.method}, lr {job.learning_rate:g}, seed {job.seed}: {load(result)['heldout_loss_after']}", flush=True
        )
    return load(result)


def load(result: Path) -> dict[str, Any]:
    """One summary; a loss that is not finite counts as infinite."""
    summary: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    if summary["heldout_loss_after"] is None:
        summary["heldout_loss_after"] = float("inf")
    return summary


def run_folder(arguments: argparse.Namespace, job: Job) -> Path:
    name = "".join(letter if letter.isalnum() else "_" for letter in job.method)
    folder: Path = arguments.output / f"{name}_lr{job.learning_rate:.1e}_seed{job.seed}"
    return folder


def result_file(arguments: argparse.Namespace, job: Job) -> Path:
    """Where the summary of a finished run lies."""
    folder: Path = arguments.output / f"{run_folder(arguments, job).name}.json"
    return folder


def launch_command(arguments: argparse.Namespace, job: Job) -> list[str]:
    """One run of launcher/train.py on one rank."""
    method = METHODS[job.method]
    overrides = {
        "model.name_or_path": arguments.model.resolve(),
        "data.train": (arguments.output / "train.txt").resolve(),
        "data.eval": (arguments.output / "heldout.txt").resolve(),
        "data.format": "text",
        "data.sequence_length": arguments.sequence_length,
        "optimizer.learning_rate": job.learning_rate,
        "train.output_dir": run_folder(arguments, job).resolve(),
        "train.overwrite": "true",
        "train.max_steps": arguments.steps,
        "train.micro_batch_size": arguments.batch,
        "train.global_batch_size": arguments.batch,
        "train.cpu_threads": 1,
        "train.seed": job.seed,
        "monitor.num_sample_prompts": 0,
        "monitor.progress_bar": "false",
        "export.merged": "false",
        **method.overrides,
    }
    if method.config != "zero3_full":
        overrides["method.density"] = arguments.density
    command = [sys.executable, str(ROOT / "launcher" / "train.py"), "--config", method.config]
    for key, value in overrides.items():
        command += ["--set", f"{key}={value}"]
    return command


def lora_command(arguments: argparse.Namespace, job: Job) -> list[str]:
    """One run of scripts/lora_baseline.py."""
    options = {
        "model": arguments.model,
        "train": arguments.output / "train.txt",
        "heldout": arguments.output / "heldout.txt",
        "learning-rate": job.learning_rate,
        "density": arguments.density,
        "steps": arguments.steps,
        "batch": arguments.batch,
        "sequence-length": arguments.sequence_length,
        "seed": job.seed,
    }
    command = [sys.executable, str(ROOT / "scripts" / "lora_baseline.py")]
    for name, value in options.items():
        command += [f"--{name}", str(value.resolve() if isinstance(value, Path) else value)]
    return command


def table(arguments: argparse.Namespace, rates: dict[str, float]) -> str:
    """Markdown: mean and range over the seeds at the best rate, and every rate of the search."""
    lines = [
        f"{arguments.steps} steps of {arguments.batch} x {arguments.sequence_length} tokens, seeds {arguments.seeds}",
        "",
        "| method | trained weights | lr | held-out before | after: mean | per seed | search (lr: after) |",
        "|---|--:|--:|--:|--:|---|---|",
    ]
    for method, rate in rates.items():
        runs = [run(arguments, Job(method, rate, seed)) for seed in arguments.seeds]
        losses = [summary["heldout_loss_after"] for summary in runs]
        lines.append(
            f"| {method} | {runs[0]['num_trained_weights']:,} | {rate:g} | {runs[0]['heldout_loss_before']:.3f} | "
            f"{statistics.mean(losses):.3f} | {', '.join(f'{loss:.3f}' for loss in losses)} | "
            f"{', '.join(searched(arguments, method))} |"
        )
    return "\n".join(lines)


def searched(arguments: argparse.Namespace, method: str) -> list[str]:
    """Every run of the search that is there: `lr: loss`."""
    found = []
    for step in range(-6, 7):
        rate = round_rate(METHODS[method].middle_rate * ROOT_OF_10**step)
        result = result_file(arguments, Job(method, rate, arguments.seeds[0]))
        if result.exists():
            found.append(f"{rate:g}: {load(result)['heldout_loss_after']:.3f}")
    return found


if __name__ == "__main__":
    main()
