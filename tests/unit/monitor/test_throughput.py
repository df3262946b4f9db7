"""Shares of the peak, worked out by hand."""

from __future__ import annotations

import pytest

from sparse_ds.monitor.peak_tflops import known_peak_tflops
from sparse_ds.monitor.throughput import throughput


def test_throughput() -> None:
    """3000 tokens of 2e9 operations in 4 s on 3 ranks: 0.5 TFLOP/s each."""
    speed = throughput(
        num_tokens=3000, model_flops=6e12, recomputed_flops=2.4e12, wall_s=4.0, num_ranks=3, peak_tflops=2.0
    )
    assert speed.to_record() == pytest.approx(
        {"tokens_per_second": 750.0, "tflops_per_rank": 0.5, "mfu": 0.25, "hfu": 0.35}
    )


def test_no_share_of_an_unknown_peak() -> None:
    speed = throughput(num_tokens=10, model_flops=1e12, recomputed_flops=0.0, wall_s=1.0, num_ranks=1, peak_tflops=None)
    assert speed.to_record() == {"tokens_per_second": 10.0, "tflops_per_rank": 1.0}


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312.0),
        ("NVIDIA A100-PCIE-40GB", "float32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.0),
        ("NVIDIA H100 PCIe", "bfloat16", 756.0),
        ("NVIDIA H100 NVL", "bfloat16", 835.0),
        ("NVIDIA H200", "bfloat16", 989.0),
        ("NVIDIA H200 NVL", "bfloat16", 835.0),
        ("NVIDIA GH200 480GB", "float32", 67.0),
        ("Tesla T4", "bfloat16", None),
        ("NVIDIA A10", "bfloat16", None),
    ],
)
def test_peaks_by_the_names_of_the_devices(name: str, dtype: str, peak: float | None) -> None:
    assert known_peak_tflops(name, dtype) == peak
