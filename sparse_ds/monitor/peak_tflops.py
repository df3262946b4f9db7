"""What a device can compute at best: the number that a utilization is a share of.

Dense matrix products, in 10^12 operations a second, from NVIDIA's data sheets; theirs "with sparsity" are twice that.
bfloat16 runs on the tensor cores. float32 is that of plain fp32 units: torch leaves TF32 off unless it is asked.
Under NF4 the products are in `model.dtype` too.
"""

from __future__ import annotations

from collections.abc import Mapping

PEAKS: Mapping[str, Mapping[str, float]] = {
    "B200": {"bfloat16": 2250.0, "float32": 75.0},
    "H200 NVL": {"bfloat16": 835.0, "float32": 60.0},
    "H200": {"bfloat16": 989.0, "float32": 67.0},
    "GH200": {"bfloat16": 989.0, "float32": 67.0},
    "H100 NVL": {"bfloat16": 835.0, "float32": 60.0},
    "H100 PCIe": {"bfloat16": 756.0, "float32": 51.0},
    "H100": {"bfloat16": 989.0, "float32": 67.0},
    "A100": {"bfloat16": 312.0, "float32": 19.5},
    "L40S": {"bfloat16": 362.0, "float32": 91.6},
}
"""Words of the name that CUDA gives a device, the more exact ones first -> dtype -> TFLOP/s."""


def known_peak_tflops(device_name: str, dtype: str) -> float | None:
    """The peak of one device; None where it is not in the table (every CPU).

    Args:
        device_name: as `torch.cuda.get_device_name` says it, "NVIDIA H100 80GB HBM3".
        dtype: of the products, "bfloat16" or "float32".
    """
    words = device_name.replace("-", " ").upper().split()
    for name, peaks in PEAKS.items():
        if set(name.upper().split()) <= set(words):
            return peaks[dtype]
    return None
