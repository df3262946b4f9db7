"""Which of the two paths computes the gradient of the values: below a density the sampled one is faster.

The choice changes how sums are rounded, so it must be the same when a run is resumed: it follows from the kind of
device, the dtype, the shape and the density alone, never from a measurement within the run. `DEFAULTS` was measured
with `scripts/bench_kernels.py`; for another machine the script prints what to put into the configuration
(`train.values_gradient_crossover`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from sparse_ds.kernels.product_operands import ProductOperands
from sparse_ds.kernels.sampled_product import can_sample

DeviceKind = Literal["cpu", "cpu with AMX", "cuda"]

DEFAULTS: Mapping[tuple[DeviceKind, int], float] = {
    # (kind of device, bytes per number): density up to which the sampled product is taken.
    ("cpu", 2): 0.04,
    ("cpu", 4): 0.045,
    ("cpu with AMX", 2): 0.01,
    ("cpu with AMX", 4): 0.06,
    ("cuda", 2): 0.0035,
    ("cuda", 4): 0.0035,
}
"""cpu: AMD EPYC with AVX-512 BF16, shapes from 1024 x 1024 to 4096 x 4096, 256 to 4096 tokens: crossovers from 0.036 to
0.076 in bf16; in fp32 from 0.11 to 0.18 where the transposes fit into the last cache (32 MiB), else from 0.044 on. With
AMX: Intel Xeon, 1024 x 1024 to 5632 x 2048, 1024 tokens: in bf16 from 0.009 to 0.022 (1024 x 2816,
whose input is the larger operand and shared with no other layer: 0.003), in fp32 from 0.064 to 0.1. On GPUs they are
estimates."""

BLOCK_DEFAULTS: Mapping[tuple[DeviceKind, int], float] = {**dict.fromkeys(DEFAULTS, 0.25), ("cpu with AMX", 2): 0.008}
"""The same for blocks of several rows: the share of the active blocks up to which only they are computed."""


@dataclass(frozen=True)
class PathChoice:
    """How a run chooses.

    Attributes:
        path: one path everywhere, or by the density.
        crossover: density up to which the sampled product is taken, instead of the defaults.
        crossover_of: the same by shape, (O, I); it goes before `crossover`.
    """

    path: Literal["auto", "sampled", "dense"] = "auto"
    crossover: float | None = None
    crossover_of: Mapping[tuple[int, int], float] = field(default_factory=dict)

    def is_sampled(self, operands: ProductOperands, num_values: int) -> bool:
        """Whether K = `num_values` values of this gradient are computed one by one."""
        if self.path != "auto" or not can_sample(operands):
            return self.path == "sampled" and can_sample(operands)
        shape = operands.num_rows, operands.num_cols
        crossover = self.crossover_of.get(shape, self.crossover)
        if crossover is None:
            crossover = DEFAULTS[device_kind(operands.input_TI.device.type), operands.input_TI.element_size()]
        return num_values <= crossover * (shape[0] * shape[1])


AUTO = PathChoice()


@functools.cache
def device_kind(device_type: str) -> DeviceKind:
    """What `DEFAULTS` tells apart."""
    if device_type == "cuda":
        return "cuda"
    return "cpu with AMX" if torch.cpu._is_amx_tile_supported() else "cpu"
