"""Peak memory above the frozen base of one step of every method: a table in markdown.

    python scripts/bench_memory.py --shape 2048 --layers 4 --densities 0.006
    python scripts/bench_memory.py --shape llama-2-7b --layers 4 --tokens 1x2048 --device cuda --json FILE

Counted is every byte that torch's allocator gives out beyond the frozen base: what trains, gradients, optimizer,
activations, scratch buffers and what a kernel needs in between.

    resident        between two steps
    step            peak of an ordinary step
    with events     peak of everything that a run does: estimation steps and events too

On the CPU it is read from torch.profiler's memory events, on a GPU from the caching allocator's statistics. Each row
has a process of its own, so that no buffer that is kept for all layers counts for the first row only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_base import random_batch
from bench_rows import NOT_IN_NF4, STEP, make_row
from bench_step import NEEDS_NO_DENSITY, add_model_options, make_base, method_settings, start
from interleaved import LABELS, describe_machine, machine_line
from torch.profiler import ProfilerActivity, profile

from sparse_ds.distributed import process_group

ROWS = ("floor", "sparta", "sft_ag", "sft_ma", "lora_0", "lora_0.1")
MEMORY_EVENT = "[memory]"


class Measured(NamedTuple):
    """Bytes above the frozen base."""

    dtype: str
    checkpointing: bool
    name: str
    density: float | None
    num_trained: int
    resident_bytes: int
    step_bytes: int
    everything_bytes: int


class Case(NamedTuple):
    dtype: str
    checkpointing: bool
    name: str
    density: float


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.set_defaults(rows=list(ROWS), densities=[0.006])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--all-cases", action="store_true", help="bfloat16 and nf4, checkpointing off and on")
    arguments = parser.parse_args(argv)
    cases = list_cases(arguments)
    # Nothing has been computed here: a fork is safe on the CPU; CUDA wants processes of their own.
    context = multiprocessing.get_context("spawn" if arguments.device == "cuda" else "fork")
    measured = []
    for case in cases:
        with context.Pool(1) as pool:
            measured.append(pool.apply(measure, (arguments, case)))
        print(table(measured[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    machine = describe_machine(torch.device(arguments.device))
    micro_batch_size, sequence_length = arguments.tokens
    print(f"\n{arguments.shape}, {arguments.layers or 'all'} layers, {micro_batch_size} x {sequence_length} tokens")
    print(f"{machine_line(machine)}\n\n{table(measured)}")
    if arguments.json is not None:
        content = {
            "machine": machine,
            "arguments": {name: str(value) for name, value in vars(arguments).items()},
            "rows": [each._asdict() for each in measured],
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def list_cases(arguments: argparse.Namespace) -> list[Case]:
    """What is measured, in the order of the table."""
    kinds = [(arguments.dtype, arguments.checkpointing)]
    if arguments.all_cases:
        kinds = [(dtype, checkpointing) for dtype in ("bfloat16", "nf4") for checkpointing in (False, True)]
    found = []
    for dtype, checkpointing in kinds:
        names = [name for name in arguments.rows if dtype != "nf4" or name not in NOT_IN_NF4]
        found += [Case(dtype, checkpointing, name, 0.0) for name in names if name in NEEDS_NO_DENSITY]
        for density in arguments.densities:
            found += [Case(dtype, checkpointing, name, density) for name in names if name not in NEEDS_NO_DENSITY]
    return found


def measure(arguments: argparse.Namespace, case: Case) -> Measured:
    """One row, in a process of its own."""
    arguments.dtype, arguments.checkpointing = case.dtype, case.checkpointing
    # A process forked by a launcher's rank would inherit its place.
    device = start(arguments)
    base = make_base(arguments, device)
    micro_batch_size, sequence_length = arguments.tokens
    batch = random_batch(base.shape, micro_batch_size, sequence_length, device)
    row: Any = None

    def begin() -> None:
        nonlocal row
        row = make_row(
            case.name,
            base,
            case.density,
            checkpointing=case.checkpointing,
            settings=method_settings(arguments.set),
            adapter_dtype=arguments.adapter_dtype,
        )
        row.step(batch)

    watch = watch_cuda if device.type == "cuda" else watch_cpu
    resident, _ = watch(begin)
    actions = row.measured(batch)
    after_step, step_peak = watch(actions.pop(STEP))
    peak = step_peak
    rest = after_step
    for action in actions.values():
        change, action_peak = watch(action)
        peak = max(peak, rest + action_peak)
        rest += change
    process_group.stop()
    return Measured(
        case.dtype,
        case.checkpointing,
        case.name,
        row.density,
        row.num_trained,
        resident,
        resident + step_peak,
        resident + peak,
    )


def watch_cpu(action: Callable[[], Any]) -> tuple[int, int]:
    """(bytes at the end, highest in between) of an action, both beyond those at its begin."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    events = [each for each in profiler.profiler.kineto_results.events() if each.name() == MEMORY_EVENT]
    held, highest = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return held, highest


def watch_cuda(action: Callable[[], Any]) -> tuple[int, int]:
    """The same for the current GPU."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    action()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before


def table(measured: Sequence[Measured]) -> str:
    """Markdown, in MB (1e6 bytes); the ratios are those of the peaks of everything."""
    lines = [
        "| base | checkpointing | density | row | trained weights | resident | step | with events | x LoRA "
        "| x LoRA 0.1 |",
        "|---|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for each in measured:
        same = [one for one in measured if (one.dtype, one.checkpointing) == (each.dtype, each.checkpointing)]
        same = [one for one in same if each.density is not None and one.density == each.density]
        ratios = [
            _ratio(each, next((one for one in same if one.name == name), None)) for name in ("lora_0", "lora_0.1")
        ]
        density = "" if each.density is None else f"{100 * each.density:g} %"
        sizes = (each.resident_bytes, each.step_bytes, each.everything_bytes)
        lines.append(
            f"| {each.dtype} | {'on' if each.checkpointing else 'off'} | {density} | {LABELS[each.name]} | "
            f"{each.num_trained:,} | {' | '.join(f'{size / 1e6:.1f}' for size in sizes)} | {' | '.join(ratios)} |"
        )
    return "\n".join(lines)


def _ratio(each: Measured, other: Measured | None) -> str:
    return "" if other is None else f"{each.everything_bytes / other.everything_bytes:.2f}"


if __name__ == "__main__":
    sys.exit(main())
