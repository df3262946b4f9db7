"""What a rank holds: its partition between steps, and no more than the configured limits within them.

Whole runs (data, evaluations, events, the adapter at the end) on 1, 2 and 4 ranks, looked into by `partition_probe`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from partition_probe import ProbeReport, probe_run
from ranks import run_ranks

MAX_LIVE_PARAMETERS = {"nf4": 25_000, "none": 45_000}
PREFETCH_BUCKET_SIZE = {"nf4": 43_000, "none": 80_000}
"""Elements: just above the largest layer, 114 x 334 weights with their deltas: 23,439 elements over NF4, 41,882 over
bf16; and that layer with the largest tensor, 19,038 or 38,076 elements. The whole model has 6 such layers."""
MAX_STEPS, INTERVAL_STEPS, ESTIMATION_STEPS, EVAL_INTERVAL_STEPS = 4, 2, 1, 3
"""Events after steps 1 and 3, evaluations before step 1, after step 3 (right after an event) and at the end. DeepSpeed
prefetches from the third of three steps that follow each other."""


@dataclass(frozen=True)
class Case:
    """One run."""

    num_ranks: int
    quantization: str
    double_quantization: bool = False
    gradient_checkpointing: bool = False
    gradient_accumulation_steps: int = 1
    limited: bool = True


CASES = [
    Case(2, "nf4", double_quantization=True, gradient_accumulation_steps=2),
    Case(4, "nf4", gradient_checkpointing=True),
    Case(2, "none"),
    # With one rank the gathered parameter is the partition itself: an edit left behind would change the base.
    Case(1, "none", gradient_checkpointing=True, limited=False),
    Case(1, "nf4", limited=False),
]


def settings_of(case: Case, base: Path, data: Path, output_dir: Path) -> dict[str, Any]:
    zero: dict[str, Any] = {"reduce_bucket_size": 3000}
    if case.limited:
        zero["stage3_max_live_parameters"] = MAX_LIVE_PARAMETERS[case.quantization]
        zero["stage3_prefetch_bucket_size"] = PREFETCH_BUCKET_SIZE[case.quantization]
        # What is used again within this distance stays gathered, whatever the limit.
        zero["stage3_max_reuse_distance"] = 0
    return {
        "model": {
            "name_or_path": str(base),
            "quantization": case.quantization,
            "double_quantization": case.double_quantization,
            "dtype": "bfloat16",
        },
        "data": {"train": str(data), "eval": str(data), "num_eval_samples": 4, "sequence_length": 16},
        "method": {"density": 0.05, "interval_steps": INTERVAL_STEPS, "estimation_steps": ESTIMATION_STEPS},
        # A rate at which the deltas are far above half a unit in the last place: the gathered base is really edited.
        "optimizer": {"learning_rate": 0.01, "momentum": 0.5},
        "train": {
            "output_dir": str(output_dir),
            "max_steps": MAX_STEPS,
            "micro_batch_size": 1,
            "gradient_accumulation_steps": case.gradient_accumulation_steps,
            "eval_micro_batch_size": 4,
            "eval_interval_steps": EVAL_INTERVAL_STEPS,
            "gradient_checkpointing": case.gradient_checkpointing,
        },
        "export": {"merged": False},
        "monitor": {"progress_bar": False, "num_sample_prompts": 0},
        "deepspeed": {"zero_optimization": zero},
    }


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] if case.num_ranks > 1 else []) for case in CASES],
    ids=lambda c: f"{c.num_ranks}ranks-{c.quantization}{'-checkpointing' * c.gradient_checkpointing}",
)
def test_a_rank_holds_its_partition_and_leaves_the_base_as_it_is(
    case: Case, tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    settings = settings_of(case, tiny_base, tiny_data, tmp_path / "run")
    reports: list[ProbeReport] = run_ranks(case.num_ranks, probe_run, settings, join_group=False)
    for report in reports:
        assert report.checks == [
            "start",
            "step 1",
            "step 2",
            "step 3",
            "evaluation after step 3",
            "step 4",
            "evaluation after step 4",
        ]
        assert report.noticed == ["gradient", "copy of a matrix", "copy of the values", "gathered"]
        assert report.checkpointed is case.gradient_checkpointing
        assert report.num_changed_values > 0
        assert report.base_after == report.base_before
        assert report.num_backward_samples > 0
        # DeepSpeed prefetches whole tensors while fewer than the limit are live, and what the layer at work needs is
        # gathered in any case: no bucket below this can be kept.
        assert report.largest_tensor_elements + report.largest_layer_elements <= PREFETCH_BUCKET_SIZE[case.quantization]
        limit = MAX_LIVE_PARAMETERS[case.quantization] + PREFETCH_BUCKET_SIZE[case.quantization]
        if case.gradient_checkpointing:
            # A block that is computed again stays gathered until the product that asked for it is done.
            limit += report.block_elements
        if case.limited:
            assert report.max_gathered_elements <= limit
        else:
            # Without the limits the same count is above them: it would notice.
            assert report.max_gathered_elements > limit
