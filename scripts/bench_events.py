"""What estimation phases and events cost in real ZeRO-3 engines: time, collectives and bytes beside an ordinary step.

    python scripts/bench_events.py --shape 1024 --layers 2 --densities 0.006
    torchrun --nproc-per-node 2 scripts/bench_events.py --shape 1024 --layers 2 --densities 0.006 --json events.json

Every round takes an ordinary step, the first step of an estimation phase, a later one and an event, in this order.
Counted are the collectives that this project issues, on rank 0, and the bytes of their inputs; those of DeepSpeed,
which are the same in all of these steps, are not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Before torch is imported: see sparse_ds/cli.py.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "cuda" not in sys.argv:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed
from bench_base import random_batch
from bench_step import add_model_options, describe, make_base, make_rows, start, waiting
from interleaved import LABELS, PARTS, describe_machine, machine_line

from sparse_ds.distributed import process_group

METHODS = ("sft_ag", "sft_ma")
COUNTED = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")


class Collectives:
    """Calls and bytes of input since the last `take`, by name."""

    def __init__(self) -> None:
        self._found: dict[str, list[int]] = {}

    def take(self) -> dict[str, list[int]]:
        found, self._found = self._found, {}
        return found

    @contextmanager
    def counted(self) -> Iterator[None]:
        genuine = {name: getattr(torch.distributed, name) for name in COUNTED}
        for name in COUNTED:
            setattr(torch.distributed, name, self._counting(name, genuine[name]))
        try:
            yield
        finally:
            for name in COUNTED:
                setattr(torch.distributed, name, genuine[name])

    def _counting(self, name: str, genuine: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if sys._getframe(1).f_globals["__name__"].startswith("sparse_ds."):
                # All of them but the all-reduce have the output first.
                sent = args[0] if name == "all_reduce" else args[1]
                calls_and_bytes = self._found.setdefault(name, [0, 0])
                calls_and_bytes[0] += 1
                calls_and_bytes[1] += sent.numel() * sent.element_size()
            return genuine(*args, **kwargs)

        return call


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--rounds", type=int, default=5, help="that count, after one that does not")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.set_defaults(rows=list(METHODS), densities=[0.006], zero3=True)
    arguments = parser.parse_args(argv)
    device = start(arguments)
    try:
        base = make_base(arguments, device)
        batch = random_batch(base.shape, *arguments.tokens, device)
        synchronize, collectives = waiting(device), Collectives()
        found = []
        for row in make_rows(arguments, base):
            ms: dict[str, list[float]] = {}
            counts: dict[str, dict[str, list[int]]] = {}
            for number in range(1 + arguments.rounds):
                for part, action in row.measured(batch).items():
                    synchronize()
                    begin = time.perf_counter()
                    with collectives.counted():
                        action()
                    synchronize()
                    counts[part] = collectives.take()
                    if number:
                        ms.setdefault(part, []).append(1e3 * (time.perf_counter() - begin))
            found.append(
                {"row": row.name, "density": row.density, "num_trained": row.num_trained, "ms": ms, "counts": counts}
            )
        if process_group.rank() == 0:
            machine = describe_machine(device)
            print(f"\n{describe(arguments)}\n{machine_line(machine)}\n\n{table(found)}")
            if arguments.json is not None:
                content = {"machine": machine, "num_ranks": process_group.world_size(), "rows": found}
                arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    finally:
        process_group.stop()
    return 0


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| density | row | part | ms | all-reduce | all-gather | reduce-scatter | MiB in all |",
        "|--:|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in found:
        for part, times in row["ms"].items():
            counts = row["counts"][part]
            calls = " | ".join(str(counts.get(name, [0, 0])[0]) for name in COUNTED)
            mib = sum(num_bytes for _, num_bytes in counts.values()) / 2**20
            lines.append(
                f"| {100 * row['density']:g} % | {LABELS[row['row']]} | {PARTS[part]} | "
                f"{statistics.median(times):.0f} | {calls} | {mib:.2f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
