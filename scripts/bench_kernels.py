"""What the operations of a sparse layer cost beside its forward product, timed in turns: a table in markdown.

    python scripts/bench_kernels.py --shapes 2048x2048 5632x2048 --tokens 1024 --dtype bfloat16
    python scripts/bench_kernels.py --device cuda --json kernels.json
    python scripts/bench_kernels.py --crossover --shapes 4096x4096 11008x4096 4096x11008 --tokens 2048

In every round each operation of a shape runs once, one after the other, so that each finds the caches as another left
them (on a GPU they are overwritten before each). Times are medians over the rounds; a ratio is the median of the ratios
to the forward product of the same round. Rows without a density stand in the first column.

`--crossover` prints up to which density the sampled gradient of the values is the faster one on this machine, as the
configuration takes it (`train.values_gradient_crossover`).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

# Before torch is imported: see sparse_ds/cli.py.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "cuda" not in sys.argv:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from interleaved import describe_machine, machine_line
from kernel_operations import DENSE, FORWARD, SAMPLED, LayerOperations, Operation, optimizer_steps

DENSITIES = (0.001, 0.003, 0.006, 0.0125, 0.023)
CROSSOVER_DENSITIES = (0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12)
NEVER = 1e-6
"""A crossover below every density."""
SHAPES = {"cpu": ["1024x1024", "2048x2048", "5632x2048"], "cuda": ["4096x4096", "11008x4096", "4096x11008"]}
TOKENS = {"cpu": 1024, "cuda": 2048}
CACHE_BYTES = 2**28
"""Written before each operation on a GPU: more than any second-level cache holds."""

Times = dict[tuple[str, float | None], list[float]]
"""(operation, density) -> ms, one number per round."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], nargs="+", default=["bfloat16"])
    parser.add_argument("--shapes", nargs="+", metavar="ROWSxCOLS", help="of matrices: output x input")
    parser.add_argument("--tokens", type=int, help="of a micro batch (1024 on the CPU, 2048 on a GPU)")
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES), help="fractions")
    parser.add_argument("--optimizer-weights", type=int, default=4_000_000, help="0: leave the optimizers out")
    parser.add_argument("--rounds", type=int, default=9, help="that count, after one that does not")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: of this process, on the CPU only"
    )
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--crossover", action="store_true", help="find the crossovers of the shapes, nothing else")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every time as JSON too")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    num_tokens = options.tokens or TOKENS[options.device]
    machine = describe_machine(device)
    print(machine_line(machine) + "\n")
    results: list[dict[str, Any]] = []
    crossovers: dict[str, dict[str, float]] = {}
    for dtype in options.dtype:
        for shape in options.shapes or SHAPES[options.device]:
            num_rows, num_cols = (int(side) for side in shape.split("x"))
            layer = LayerOperations(num_rows, num_cols, num_tokens, getattr(torch, dtype), device)
            if options.crossover:
                times = time_in_turns(layer.gradients(CROSSOVER_DENSITIES), options.rounds, device, clock)
                crossovers.setdefault(dtype, {})[shape] = crossover(times)
                print(f"{dtype}, {shape}, {num_tokens} tokens: {crossovers[dtype][shape]:g}", flush=True)
            else:
                operations = [*layer.products(), *layer.gradients(options.densities), *layer.blocks(options.densities)]
                operations += [*layer.deltas(options.densities), *layer.compact_indices(options.densities)]
                operations += layer.nf4(options.densities)
                times = time_in_turns(operations, options.rounds, device, clock)
                print(f"### {shape}, {num_tokens} tokens, {dtype}\n\n{table(times, options.densities)}\n", flush=True)
            results += records(times, shape=shape, dtype=dtype, tokens=num_tokens)
    for dtype, by_shape in crossovers.items():
        print(f"\n{dtype}: --set 'train.values_gradient_crossover={json.dumps(by_shape)}'")
    if options.optimizer_weights and not options.crossover:
        times = time_in_turns(optimizer_steps(options.optimizer_weights, device), options.rounds, device, clock)
        print(f"### One optimizer step, {options.optimizer_weights:,} weights\n\n{table(times, [])}")
        results += records(times, weights=options.optimizer_weights)
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine, "crossovers": crossovers, "times": results}, indent=1))
    return 0


def time_in_turns(
    operations: Iterable[Operation], rounds: int, device: torch.device, clock: Callable[[], float]
) -> Times:
    """Each operation once a round, in an order that rotates; the first round (compiling) does not count."""
    operations = list(operations)
    times: Times = {(each.name, each.density): [] for each in operations}
    stopwatch = _gpu_ms if device.type == "cuda" else _cpu_ms
    cache = torch.empty(CACHE_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds + 1):
            shift = number % len(operations)
            for each in operations[shift:] + operations[:shift]:
                cache.zero_()
                ms = stopwatch(each.action, clock)
                if number > 0:
                    times[each.name, each.density].append(ms)
    finally:
        gc.enable()
    return times


def _cpu_ms(action: Callable[[], Any], clock: Callable[[], float]) -> float:
    begin = clock()
    action()
    return 1e3 * (clock() - begin)


def _gpu_ms(action: Callable[[], Any], clock: Callable[[], float]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    action()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def table(times: Times, densities: Sequence[float]) -> str:
    """Markdown: operations down, densities across; each cell ms and the ratio to the forward product."""
    forward = times.get((FORWARD, None))
    columns = [f"{100 * density:g} %" for density in densities] or ["ms"]
    lines = [f"| operation | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in dict.fromkeys(name for name, _ in times):
        cells = [_cell(times.get((name, density)), forward) for density in densities]
        if (name, None) in times:
            cells = [_cell(times[name, None], forward), *cells[1:]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(times: list[float] | None, forward: list[float] | None) -> str:
    if times is None:
        return ""
    ms = f"{statistics.median(times):.3g} ms"
    if forward is None:
        return ms
    return f"{ms}, x{statistics.median(one / two for one, two in zip(times, forward, strict=True)):.3f}"


def crossover(times: Times) -> float:
    """The density at which both paths take as long, on a straight line between two that were measured; NEVER or the
    largest one if there is none."""
    differences = []
    for density in CROSSOVER_DENSITIES:
        if (SAMPLED, density) not in times:
            return NEVER
        pairs = zip(times[SAMPLED, density], times[DENSE, density], strict=True)
        differences.append(statistics.median(sampled - dense for sampled, dense in pairs))
    if differences[0] >= 0:
        return NEVER
    for (low, below), (high, above) in pairwise(zip(CROSSOVER_DENSITIES, differences, strict=True)):
        if above >= 0:
            return float(f"{low + (high - low) * below / (below - above):.2g}")
    return CROSSOVER_DENSITIES[-1]


def records(times: Times, **where: Any) -> list[dict[str, Any]]:
    """For JSON."""
    return [{**where, "operation": name, "density": density, "ms": ms} for (name, density), ms in times.items()]


if __name__ == "__main__":
    raise SystemExit(main())
