"""One optimizer step of every method on one and the same frozen base, timed in turns: a table in markdown.

    python scripts/bench_step.py --shape 2048 --layers 4 --dtype bfloat16 --densities 0.003 0.006
    python scripts/bench_step.py --shape llama-2-7b --layers 4 --tokens 1x2048 --dtype nf4 --device cuda --json FILE
    torchrun --nproc-per-node 2 scripts/bench_step.py --zero3 --shape 1024 --layers 2

A step is forward, backward and optimizer of one micro batch of random tokens; all rows have the same tokens, the same
loss and the same frozen weights, which are random and lie in memory once.

    frozen floor    forward and input gradient only
    SpaRTA, ...     this project's methods; where there are events: an ordinary step, the steps of the estimation
                    phase and the event on their own, and all together (S = 20, gamma = 5)
    LoRA, ...       peft, on the same matrices, with the rank whose number of weights is nearest; torch's fused AdamW
    full            all weights, in the dtype of the base with moments in the same dtype

Without `--zero3` it is one process without partitioning, where the project's parameters are always gathered. With it,
under torchrun, every row is a real DeepSpeed ZeRO-3 engine.

A ratio is the median of the ratios within the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Before torch is imported: see sparse_ds/cli.py.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "cuda" not in sys.argv:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed
from bench_base import SHAPES, FrozenBase, random_base, random_batch, shape_of
from bench_rows import NOT_IN_NF4, OURS, ROWS, Row, make_row
from interleaved import LABELS, describe_machine, machine_line, table, time_in_turns

from sparse_ds.distributed import process_group
from sparse_ds.distributed.launch_environment import complete_environment

NEEDS_NO_DENSITY = ("floor", "full")
DENSITIES = (0.001, 0.003, 0.006, 0.0125, 0.023)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--rounds", type=int, default=7, help="that count, after one that does not")
    parser.add_argument("--zero3", action="store_true", help="real ZeRO-3 engines; under torchrun")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: time of this process, where others are busy too"
    )
    parser.add_argument("--profile", action="store_true", help="also a table of where the time goes")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    device = start(arguments)
    try:
        base = make_base(arguments, device)
        micro_batch_size, sequence_length = arguments.tokens
        batch = random_batch(base.shape, micro_batch_size, sequence_length, device)
        rows = make_rows(arguments, base)
        timed = time_in_turns(rows, batch, arguments.rounds, synchronize=waiting(device))
        if process_group.rank() == 0:
            machine = describe_machine(device)
            shown = [each.on_cpu_clock() for each in timed] if arguments.clock == "cpu" else timed
            print(f"\n{describe(arguments)}\n{machine_line(machine)}\n\n{table(shown)}")
            if arguments.json is not None:
                content = {
                    "machine": machine,
                    "arguments": {name: str(value) for name, value in vars(arguments).items()},
                    "num_ranks": process_group.world_size(),
                    "rows": [each._asdict() for each in timed],
                }
                arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        if arguments.profile:
            from step_profile import profile_table

            found = profile_table(rows, batch, LABELS)
            if process_group.rank() == 0:
                print(f"\n{found}")
    finally:
        process_group.stop()
    return 0


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What `bench_step.py` and `bench_memory.py` have in common."""
    parser.add_argument("--shape", choices=list(SHAPES), default="1024", help="of the model; numbers: the hidden size")
    parser.add_argument("--layers", type=int, default=4, help="how many of its layers (0: all)")
    parser.add_argument("--tokens", type=batch_size, default=(2, 512), metavar="BxS", help="of a micro batch: 2x512")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32", "nf4"], default="bfloat16", help="nf4: over bfloat16"
    )
    parser.add_argument("--checkpointing", action="store_true", help="of the activations of each block")
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; by default all cores, shared by the ranks")
    parser.add_argument(
        "--adapter-dtype",
        choices=["float32", "base"],
        default="float32",
        help="of peft's weights: float32, with autocast, as transformers' Trainer has it, or the dtype of the base",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="of a run's configuration, for the sparse rows; without a section it is `method`",
    )


def batch_size(text: str) -> tuple[int, int]:
    micro_batch_size, _, sequence_length = text.partition("x")
    return int(micro_batch_size), int(sequence_length)


def start(arguments: argparse.Namespace) -> torch.device:
    """The process group (of one rank without a launcher), threads, seeds."""
    warnings.filterwarnings("ignore")
    launch = complete_environment(os.environ)
    process_group.start(arguments.device)
    if arguments.device == "cuda":
        return torch.device("cuda", launch.local_rank)
    torch.set_num_threads(arguments.threads or max(1, len(os.sched_getaffinity(0)) // launch.world_size))
    return torch.device("cpu")


def make_base(arguments: argparse.Namespace, device: torch.device) -> FrozenBase:
    dtype = torch.bfloat16 if arguments.dtype == "nf4" else getattr(torch, arguments.dtype)
    shape = shape_of(arguments.shape, arguments.layers or None)
    return random_base(shape, dtype, nf4=arguments.dtype == "nf4", device=device)


def make_rows(arguments: argparse.Namespace, base: FrozenBase) -> list[Row]:
    """All rows, those with a density once for each."""
    make: Callable[..., Row] = make_row
    names = [name for name in arguments.rows if not (base.nf4 and name in NOT_IN_NF4)]
    if arguments.zero3:
        from zero3_rows import ZERO3_ROWS, make_engine_row

        make = make_engine_row
        names = [name for name in names if name in (OURS if base.nf4 else ZERO3_ROWS)]
    options: dict[str, Any] = {
        "checkpointing": arguments.checkpointing,
        "settings": method_settings(arguments.set),
        "adapter_dtype": arguments.adapter_dtype,
    }
    rows = [make(name, base, 0.0, **options) for name in names if name in NEEDS_NO_DENSITY]
    for density in arguments.densities:
        rows += [make(name, base, density, **options) for name in names if name not in NEEDS_NO_DENSITY]
    return rows


def method_settings(given: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE to a dict by `section.key`; the value is JSON, else text."""
    settings: dict[str, Any] = {}
    for each in given:
        key, _, value = each.partition("=")
        key = key if "." in key else f"method.{key}"
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = value
    return settings


def waiting(device: torch.device) -> Callable[[], None]:
    """Wait for the device and for the other ranks."""

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        if process_group.world_size() > 1:
            torch.distributed.barrier()

    return synchronize


def describe(arguments: argparse.Namespace) -> str:
    micro_batch_size, sequence_length = arguments.tokens
    adapters = "base" if arguments.zero3 else arguments.adapter_dtype
    ranks = f"ZeRO-3 on {process_group.world_size()} rank(s)" if arguments.zero3 else "no partitioning"
    return (
        f"{arguments.shape}, {arguments.layers or 'all'} layers, {micro_batch_size} x {sequence_length} tokens, "
        f"{arguments.dtype}, checkpointing {'on' if arguments.checkpointing else 'off'}, {ranks}, "
        f"{arguments.device}, peft's weights {adapters}, {arguments.rounds} rounds"
    )


if __name__ == "__main__":
    sys.exit(main())
