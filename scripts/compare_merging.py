"""Adapters of several texts, merged into one model in every way: a table of held-out losses on each text.

    python scripts/compare_merging.py --model MODEL --text grimm=grimm.txt --text plays=plays.txt --output runs/merging

The first 85 % of a text's lines train an adapter of its own through launcher/train.py, the rest is held out. The
adapters are merged by sum, by equal weights, by TIES and by DARE at several settings, with nothing tuned further, and
every merged model is loaded in plain transformers and measured on all held-out texts. Beside them stand the base and
every adapter alone, and what the adapters have in common.

An adapter that is finished is kept in the output folder and not trained again, so the script can be interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from compare_methods import split_text
from lora_baseline import heldout_loss
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from sparse_ds.adapter.adapter import Adapter
from sparse_ds.adapter.combining import Combination, CombinedAdapter
from sparse_ds.adapter.native import load_adapter
from sparse_ds.adapter.overlap import overlap
from sparse_ds.data import CausalCollator, build_dataset
from sparse_ds.export.merged import merge_adapter

ROOT = Path(__file__).resolve().parent.parent
TIES_DENSITIES = (0.2, 0.5, 0.8)
"""0.2 is the paper's, of dense task vectors."""
DROP_RATES = (0.2, 0.5, 0.9)
DROP_SEED = 0


class Row(NamedTuple):
    """One line of the table."""

    name: str
    num_deltas: int
    """Of the merged adapter."""
    losses: dict[str, float]
    """Held-out loss by text."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a Llama checkpoint")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE", help="plain text; twice or more")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--method", choices=["sft_ag", "sparta"], default="sft_ag", help="of the adapters")
    parser.add_argument("--learning-rate", type=float, default=3.2e-3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8, help="samples a step")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--heldout-samples", type=int, default=64, help="at most so many of each text")
    parser.add_argument("--threads", type=int, default=1, help="of the measurements")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    arguments = parser.parse_args()
    texts = {name: Path(path) for name, _, path in (text.partition("=") for text in arguments.text)}
    if len(texts) < 2 or not all(path.is_file() for path in texts.values()):
        parser.error("--text NAME=FILE is needed twice or more, with different names and files that exist")
    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    adapters = {name: train(arguments, name, path, seed) for seed, (name, path) in enumerate(texts.items())}
    rows = list(measure(arguments, adapters))
    shared = overlap(list(adapters.values()), names=list(adapters))
    print(table(rows), "", shared.table(), "", environment(), sep="\n")
    if arguments.json is not None:
        settings = {name: str(value) for name, value in vars(arguments).items()}
        content = {
            "settings": settings,
            "environment": environment(),
            "rows": [row._asdict() for row in rows],
            "overlap": shared.to_dict(),
        }
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def train(arguments: argparse.Namespace, name: str, text: Path, seed: int) -> Adapter:
    """The adapter of one text, trained if it is not there yet.

    Every text has a seed of its own: with one for all, the random indices of SpaRTA would be the same.
    """
    folder: Path = arguments.output / name
    if not (folder / "run" / "adapter").is_dir():
        split_text(text, folder)
        started = time.perf_counter()
        with (folder / "train.log").open("w", encoding="utf-8") as log:
            subprocess.run(launch_command(arguments, folder, seed), check=True, stdout=log, stderr=log, cwd=ROOT)
        print(f"{name}: trained in {time.perf_counter() - started:.0f} s", flush=True)
    return load_adapter(folder / "run" / "adapter")


def launch_command(arguments: argparse.Namespace, folder: Path, seed: int) -> list[str]:
    """One run of launcher/train.py on one rank."""
    overrides = {
        "model.name_or_path": arguments.model.resolve(),
        "model.quantization": "none",
        "data.train": (folder / "train.txt").resolve(),
        "data.eval": (folder / "heldout.txt").resolve(),
        "data.format": "text",
        "data.sequence_length": arguments.sequence_length,
        "method.name": arguments.method,
        "method.density": arguments.density,
        "optimizer.learning_rate": arguments.learning_rate,
        "train.output_dir": (folder / "run").resolve(),
        "train.overwrite": "true",
        "train.max_steps": arguments.steps,
        "train.micro_batch_size": arguments.batch,
        "train.global_batch_size": arguments.batch,
        "train.seed": seed,
        "monitor.num_sample_prompts": 0,
        "monitor.progress_bar": "false",
        "export.merged": "false",
    }
    command = [sys.executable, str(ROOT / "launcher" / "train.py"), "--config", "zero3_sft_ag"]
    for key, value in overrides.items():
        command += ["--set", f"{key}={value}"]
    return command


def measure(arguments: argparse.Namespace, adapters: dict[str, Adapter]) -> Iterator[Row]:
    """The base, every adapter alone, and all of them merged in every way."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    heldout = {}
    for name in adapters:
        path, length = arguments.output / name / "heldout.txt", arguments.sequence_length
        rows = build_dataset(path, tokenizer, data_format="text", sequence_length=length).dataset
        heldout[name] = rows.select(range(min(len(rows), arguments.heldout_samples)))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def row(name: str, folder: Path, num_deltas: int) -> Row:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        losses = {
            text: heldout_loss(model, rows, CausalCollator(pad), arguments.batch) for text, rows in heldout.items()
        }
        print(f"{name}: {losses}", flush=True)
        return Row(name, num_deltas, losses)

    yield row("base", arguments.model, 0)
    for name, adapter in candidates(adapters):
        folder = arguments.output / "merged"
        report = merge_adapter(arguments.model, adapter, folder, overwrite=True)
        yield row(name, folder, report.num_deltas)
        shutil.rmtree(folder)


def candidates(adapters: dict[str, Adapter]) -> Iterator[tuple[str, Adapter]]:
    """Every adapter alone, then the merged ones."""
    for name, adapter in adapters.items():
        yield f"{name} alone", adapter
    sources = list(adapters.values())
    equal = (1 / len(sources),) * len(sources)
    yield "sum", CombinedAdapter(sources)
    yield f"linear, weights {equal[0]:.2g}", CombinedAdapter(sources, Combination("linear", weights=equal))
    for density in TIES_DENSITIES:
        yield f"TIES, density {density}", CombinedAdapter(sources, Combination("ties", density=density))
        yield (
            f"TIES, density {density}, weights {equal[0]:.2g}",
            CombinedAdapter(sources, Combination("ties", weights=equal, density=density)),
        )
    for drop_rate in DROP_RATES:
        drops: dict[str, Any] = {"drop_rate": drop_rate, "seed": DROP_SEED}
        yield f"DARE, drop rate {drop_rate}", CombinedAdapter(sources, Combination("dare_linear", **drops))
        yield (
            f"DARE, drop rate {drop_rate}, weights {equal[0]:.2g}",
            CombinedAdapter(sources, Combination("dare_linear", weights=equal, **drops)),
        )
        yield f"DARE + TIES, drop rate {drop_rate}", CombinedAdapter(sources, Combination("dare_ties", **drops))


def table(rows: list[Row]) -> str:
    """Markdown: held-out loss on each text, and their mean."""
    texts = list(rows[0].losses)
    lines = [
        f"| model | deltas | {' | '.join(f'loss on {text}' for text in texts)} | mean |",
        f"|---|--:|{'--:|' * (len(texts) + 1)}",
    ]
    for row in rows:
        losses = [row.losses[text] for text in texts]
        shown = " | ".join(f"{loss:.3f}" for loss in [*losses, sum(losses) / len(losses)])
        lines.append(f"| {row.name} | {row.num_deltas:,} | {shown} |")
    return "\n".join(lines)


def environment() -> str:
    """Hardware and versions."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "deepspeed", "peft"))
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}, {packages}"


if __name__ == "__main__":
    main()
