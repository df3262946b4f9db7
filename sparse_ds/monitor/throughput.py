"""How fast a run trains: tokens a second, operations a second, and the shares of the peak that these are.

    tokens_per_second    tokens of all ranks / seconds, without padding
    tflops_per_rank      operations that these tokens need (`model.flops`) / seconds / ranks, in 10^12 a second
    mfu                  tflops_per_rank / peak                    model FLOPs utilization
    hfu                  the same with what activation checkpointing does once more: hardware FLOPs utilization

`mfu` and `hfu` are there only where the peak is known (`monitor.peak_tflops`). The seconds are those of whole steps:
data, events, communication and optimizer included, evaluation left out.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Throughput:
    """See the module docstring."""

    tokens_per_second: float
    tflops_per_rank: float
    mfu: float | None
    hfu: float | None

    def to_record(self) -> dict[str, float]:
        """The fields that are known."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def throughput(
    *,
    num_tokens: float,
    model_flops: float,
    recomputed_flops: float,
    wall_s: float,
    num_ranks: int,
    peak_tflops: float | None,
) -> Throughput:
    """Of some steps.

    Args:
        num_tokens: of all ranks.
        model_flops: what they need.
        recomputed_flops: what is done once more; 0 without activation checkpointing.
        wall_s: of these steps.
        num_ranks: devices that share the work.
        peak_tflops: of one device; None: not known.
    """
    tflop_seconds = max(wall_s, 1e-9) * num_ranks * 1e12
    needed, done = model_flops / tflop_seconds, (model_flops + recomputed_flops) / tflop_seconds
    return Throughput(
        tokens_per_second=num_tokens / max(wall_s, 1e-9),
        tflops_per_rank=needed,
        mfu=None if peak_tflops is None else needed / peak_tflops,
        hfu=None if peak_tflops is None else done / peak_tflops,
    )
