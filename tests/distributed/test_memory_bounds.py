"""No dense buffer beyond a tile: what construction, steps, estimation and events take above the base is O(K).

Measured by the allocator's own record (torch's profiler) on one rank, at three sizes; the dense gradient of the largest
matrix alone would be 128 MiB, far above every bound here. With one rank nothing is divided: per-rank figures with more
ranks are smaller, except for what is gathered (one batch of tensors at an event).

    sft_ag, sft_ma      peak <= c * K + tile + scratch
    fisher              the same + 4 * N / R, the accumulator of the method (`gradient_accumulator_limit_gib`)
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from exact_run import NUM_SAMPLES, ExactRun, run_config
from memory_run import live_bytes, peak_bytes
from ranks import run_ranks

from sparse_ds.kernels import dense_row_blocks
from sparse_ds.selection.bernoulli_subset import bernoulli_subset
from sparse_ds.selection.outer_topk import outer_product_topk
from sparse_ds.selection.random_subset import random_subset

pytestmark = pytest.mark.slow

SIZES = ((2048, 4096), (4096, 4096), (4096, 8192))
DENSITY = 0.004
TILE_BYTES = 2**20
SCRATCH_BYTES = 2**20
"""Of the values' gradient: set lower than its default of 32 MiB, beside which the rest could not be seen."""
FIXED_BYTES = 4 * 2**20
"""Sizes that do not grow with K or N: DeepSpeed's smallest bucket, histograms, tables of bias corrections, tokens."""

HISTOGRAM_BYTES = 2**15
"""And what else is small and the same for all sizes."""

BYTES_PER_ACTIVE_WEIGHT = {
    # method: (peak while the run is made, peak of a step with an event). Measured: 32 and 121, 28 and 99, 32 and 45.
    "sft_ag": (36, 130),
    "sft_ma": (32, 105),
    "fisher": (36, 60),
}
METHODS: dict[str, dict[str, Any]] = {
    "sft_ag": {"name": "sft_ag", "interval_steps": 3, "estimation_steps": 2, "gradient_tile_mib": 1},
    "sft_ma": {"name": "sft_ma", "interval_steps": 3, "estimation_steps": 2, "random_growth_fraction": 0.1},
    "fisher": {"name": "fisher", "estimation_steps": 2, "gradient_tile_mib": 1},
}


def measure(shape: tuple[int, int], method: str) -> dict[str, int]:
    """Bytes: of construction, and of each of six steps (estimation, event, neither, and again) what it leaves and
    its peak."""
    config = run_config(METHODS[method], num_ranks=1, accumulation=1, steps=6, density=DENSITY)
    runs: list[ExactRun] = []
    measured = {"construction": peak_bytes(lambda: runs.append(ExactRun(config, {"matrix": shape})))}
    (run,) = runs
    for step in range(1, 7):
        before = live_bytes()
        measured[f"step {step}"] = peak_bytes(partial(run.train_step, step))
        measured[f"held by step {step}"] = live_bytes() - before
    assert len(run.records) == (1 if method == "fisher" else 2)
    measured["num_active"] = run.layers["matrix"].num_active
    return measured


def measure_all() -> dict[str, list[dict[str, int]]]:
    torch.set_num_threads(1)
    dense_row_blocks.SCRATCH_ELEMENTS = SCRATCH_BYTES // 4
    return {method: [measure(shape, method) for shape in SIZES] for method in METHODS}


@pytest.fixture(scope="module")
def measured() -> dict[str, list[dict[str, int]]]:
    found: dict[str, list[dict[str, int]]] = run_ranks(1, measure_all, timeout_s=500)[0]
    return found


@pytest.mark.parametrize("method", METHODS)
def test_memory_of_a_run(method: str, measured: dict[str, list[dict[str, int]]]) -> None:
    kept, transient = BYTES_PER_ACTIVE_WEIGHT[method]
    for (num_rows, num_cols), found in zip(SIZES, measured[method], strict=True):
        num_active, base_bytes = found["num_active"], 4 * num_rows * num_cols
        tokens_bytes = 64 * NUM_SAMPLES * (num_rows + num_cols)
        allowed = FIXED_BYTES + tokens_bytes
        assert found["construction"] <= base_bytes + kept * num_active + allowed
        accumulator_bytes = base_bytes if method == "fisher" else 0
        for step in range(1, 7):
            bound = transient * num_active + TILE_BYTES + SCRATCH_BYTES + accumulator_bytes + allowed
            assert found[f"step {step}"] <= bound, f"{num_rows} x {num_cols}, step {step}"


def test_memory_held_in_an_estimation_phase(measured: dict[str, list[dict[str, int]]]) -> None:
    """Between two of its steps an index and two sums for each candidate; after the event the cohort of each active
    weight, of which there are several now."""
    for found in measured["sft_ag"]:
        candidates_bytes = 12 * found["num_active"]
        assert candidates_bytes <= found["held by step 4"] <= candidates_bytes + HISTOGRAM_BYTES
        left_bytes = found["held by step 4"] + found["held by step 5"] - found["num_active"]
        assert abs(left_bytes) <= HISTOGRAM_BYTES
        assert abs(found["held by step 6"]) <= HISTOGRAM_BYTES


@pytest.mark.parametrize("shape", SIZES)
def test_memory_of_the_pure_functions(shape: tuple[int, int]) -> None:
    """Outer-product top-k (all scores tied at 0 is the worst case) and the initial samples."""
    num_rows, num_cols = shape
    num_elements = num_rows * num_cols
    num_active = int(DENSITY * num_elements)
    active = random_subset(num_elements, num_active, seed=0, name="matrix")
    for row_acc in (torch.rand(num_rows), torch.zeros(num_rows)):
        col_acc = torch.rand(num_cols)
        peak = peak_bytes(
            lambda row_acc=row_acc, col_acc=col_acc: outer_product_topk(row_acc, col_acc, active, num_active)
        )
        assert peak <= 120 * num_active + 200 * (num_rows + num_cols)
    # These draw in NumPy; their own tests bound NumPy's memory too.
    assert peak_bytes(lambda: random_subset(num_elements, num_active, seed=1, name="m")) <= 48 * num_active
    assert peak_bytes(lambda: bernoulli_subset(num_elements, DENSITY, seed=1, name="m")) <= 48 * num_active
