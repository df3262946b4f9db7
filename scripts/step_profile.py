"""Where the time of a step goes: torch.profiler's operators, added up by what they are for.

    optimizer            all inside of `Optimizer.step`
    dequantize           4-bit weights to a dense matrix
    deltas               what puts the deltas into a weight and takes them out again
    values' gradient     all else in the backward of a sparse layer but its input gradient
    attention            scaled_dot_product_attention, forward and backward
    matrix products      the rest of them: forward and input gradients, for LoRA its own too
    dropout
    element-wise, copies norms, rotary embedding, activations, loss, casts, residual sums
    no operator          the wall clock of the step less all operators: Python, and waiting

On a GPU it is the time of the kernels that the operators start.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from bench_rows import Batch, Row
from torch.profiler import ProfilerActivity, profile, record_function

from sparse_ds.sparse.sparse_linear import SparseLinear

DELTAS = "sparse_ds::deltas"
NO_OPERATOR = "no operator"
GROUPS = (
    "matrix products",
    "attention",
    "dequantize",
    "deltas",
    "values' gradient",
    "optimizer",
    "dropout",
    "element-wise, copies",
    NO_OPERATOR,
)
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul", "mkldnn")
NUM_STEPS = 2


def profile_table(rows: Sequence[Row], batch: Batch, labels: Mapping[str, str]) -> str:
    """Markdown: ms of an ordinary step by group, one column a row. Every rank must call it."""
    columns = {}
    for row in rows:
        density = "" if row.density is None else f" ({100 * row.density:g} %)"
        columns[f"{labels[row.name]}{density}"] = profile_row(row, batch)
    lines = [f"| ms of a step | {' | '.join(columns)} |", f"|---|{'--:|' * len(columns)}"]
    for group in GROUPS:
        lines.append(f"| {group} | {' | '.join(f'{found[group]:.1f}' for found in columns.values())} |")
    lines.append(f"| all | {' | '.join(f'{sum(found.values()):.1f}' for found in columns.values())} |")
    return "\n".join(lines)


def profile_row(row: Row, batch: Batch) -> dict[str, float]:
    """ms per step by group."""
    row.step(batch)
    is_cuda = torch.cuda.is_available() and batch["input_ids"].is_cuda
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with deltas_marked(), profile(activities=activities) as profiler:
        begin = time.perf_counter()
        for _ in range(NUM_STEPS):
            row.step(batch)
        if is_cuda:
            torch.cuda.synchronize()
        wall_ms = 1e3 * (time.perf_counter() - begin)
    found = dict.fromkeys(GROUPS, 0.0)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CPU:
            own_us = event.self_device_time_total if is_cuda else event.self_cpu_time_total
            found[group_of(event)] += own_us / 1e3
    # What lies outside of all operators belongs to the ranges around them.
    found[NO_OPERATOR] = max(0.0, wall_ms - sum(ms for group, ms in found.items() if group != NO_OPERATOR))
    return {group: ms / NUM_STEPS for group, ms in found.items()}


def group_of(event: Any) -> str:
    """The group of one profiler event, by its own name and those of the ranges around it."""
    names = list(_names(event))
    if any(name.startswith("Optimizer.") for name in names):
        return "optimizer"
    if any("dequantize" in name for name in names):
        return "dequantize"
    if any("scaled_dot_product" in name or "flash_attention" in name for name in names):
        return "attention"
    if DELTAS in names:
        return "deltas"
    is_product = names[0].startswith(PRODUCTS)
    if any("_SparseLinearFunctionBackward" in name for name in names):
        is_input_gradient = is_product and any(name.startswith("aten::matmul") for name in names)
        if is_input_gradient:
            return "matrix products"
        return NO_OPERATOR if names[0].endswith("_SparseLinearFunctionBackward") else "values' gradient"
    if is_product:
        return "matrix products"
    if any("dropout" in name or "bernoulli" in name for name in names):
        return "dropout"
    return "element-wise, copies" if names[0].startswith(("aten::", "torch::", "bitsandbytes")) else NO_OPERATOR


def _names(event: Any) -> Iterator[str]:
    while event is not None:
        yield event.name
        event = event.cpu_parent


@contextmanager
def deltas_marked() -> Iterator[None]:
    """Within the context the profiler sees where deltas are put in and taken out."""
    original = SparseLinear.merged_weight

    @contextmanager
    def merged_weight(layer: SparseLinear, active_indices: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
        context = original(layer, active_indices)
        with record_function(DELTAS):
            weight_OI = context.__enter__()
        try:
            yield weight_OI
        finally:
            with record_function(DELTAS):
                context.__exit__(None, None, None)

    SparseLinear.merged_weight = merged_weight  # type: ignore[method-assign]
    try:
        yield
    finally:
        SparseLinear.merged_weight = original  # type: ignore[method-assign]
