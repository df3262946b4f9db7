"""The operations of one sparse layer, each ready to be timed: name, density, action."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from sparse_ds.kernels import triton_kernels
from sparse_ds.kernels.apply_deltas import apply_deltas_, deltas_applied
from sparse_ds.kernels.crossover import PathChoice
from sparse_ds.kernels.nf4 import dequantize_nf4, quantize_nf4
from sparse_ds.kernels.product_operands import InputUse, ProductOperands
from sparse_ds.kernels.sampled_product import can_sample
from sparse_ds.kernels.transposes import transposed
from sparse_ds.kernels.values_gradient import values_gradient
from sparse_ds.optim.flat_segment import FlatSegment
from sparse_ds.optim.sm3 import SparseSM3
from sparse_ds.optim.sparse_adamw import SparseAdamW
from sparse_ds.sparse.compact_indices import decode_indices, encode_indices
from sparse_ds.sparse.gradient_at import gradient_at
from sparse_ds.sparse.layout import SparseLayout

FORWARD = "forward product"
BLOCKS = ((16, 16), (1, 16))
SAMPLED, SHARED, DENSE = "values' gradient, sampled", "the same, X^T shared", "values' gradient, dense"


class Operation(NamedTuple):
    """What is timed; without a density it does not depend on one."""

    name: str
    density: float | None
    action: Callable[[], Any]


class LayerOperations:
    """Of one matrix [O, I] at T tokens; random numbers.

    Args:
        num_rows, num_cols, num_tokens: O, I, T.
        dtype: of weight and activations.
        device: where.
    """

    def __init__(self, num_rows: int, num_cols: int, num_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.num_tokens, self.dtype, self.device = (num_rows, num_cols), num_tokens, dtype, device
        self.generator = torch.Generator(device).manual_seed(0)
        self.weight = self._random(num_rows, num_cols)
        self.input, self.grad_output = self._random(num_tokens, num_cols), self._random(num_tokens, num_rows)
        self.whole_input_IT = transposed(self.input)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(self.dtype)

    def indices(self, density: float, num_positions: int | None = None) -> Tensor:
        """[K] int32, ascending, unique: one of every 1 / density positions, at random among them."""
        num_positions = num_positions or self.weight.numel()
        num_active = max(1, int(density * num_positions))
        step = num_positions / num_active
        places = torch.rand(num_active, generator=self.generator, device=self.device, dtype=torch.float64)
        begins = torch.arange(num_active, device=self.device, dtype=torch.float64) * step
        return (begins + places * (step - 1)).int().unique()

    def products(self) -> Iterator[Operation]:
        yield Operation(FORWARD, None, lambda: F.linear(self.input, self.weight))
        yield Operation("input gradient", None, lambda: self.grad_output @ self.weight)
        yield Operation("dense weight gradient, as autograd does it", None, lambda: self.grad_output.t() @ self.input)
        yield Operation("X^T, torch's copy", None, lambda: self.input.t().contiguous())
        yield Operation("X^T", None, lambda: transposed(self.input))
        yield Operation("dY^T", None, lambda: transposed(self.grad_output))

    def gradients(self, densities: Sequence[float]) -> Iterator[Operation]:
        for density in densities:
            indices = self.indices(density)
            if can_sample(ProductOperands(self.grad_output, self.input)):
                yield Operation(SAMPLED, density, partial(self._gradient, indices, None, PathChoice("sampled"), False))
                yield Operation(SHARED, density, partial(self._gradient, indices, None, PathChoice("sampled"), True))
            layout = SparseLayout(*self.shape, indices.numel())
            known: dict[int, list[int]] = {}
            boundaries = partial(_remembered, known, layout, indices)
            yield Operation(DENSE, density, partial(self._gradient, indices, boundaries, PathChoice("dense"), False))

    def _gradient(self, indices: Tensor, boundaries: Any, choice: PathChoice, shared: bool) -> Tensor:
        use = InputUse()
        if shared:
            use.shared.transposed_IT = self.whole_input_IT
        return values_gradient(ProductOperands(self.grad_output, self.input, use), indices, boundaries, choice=choice)

    def blocks(self, densities: Sequence[float]) -> Iterator[Operation]:
        """The gradient of all weights of the active blocks, at the same density."""
        num_rows, num_cols = self.shape
        for block_rows, block_cols in BLOCKS:
            if num_rows % block_rows or num_cols % block_cols:
                continue
            for density in densities:
                blocks = self.indices(density, num_rows // block_rows * (num_cols // block_cols))
                layout = SparseLayout(*self.shape, blocks.numel() * block_rows * block_cols, 0, block_rows, block_cols)
                boundaries = partial(_remembered, {}, layout, blocks)
                gradient = partial(self._block_gradient, layout, blocks, boundaries)
                yield Operation(f"gradient of {block_rows} x {block_cols} blocks", density, gradient)

    def _block_gradient(self, layout: SparseLayout, blocks: Tensor, boundaries: Any) -> Tensor:
        return gradient_at(layout, ProductOperands(self.grad_output, self.input), blocks, boundaries)

    def deltas(self, densities: Sequence[float]) -> Iterator[Operation]:
        weight_OI = self.weight.clone()
        for density in densities:
            indices = self.indices(density)
            values = torch.randn(indices.numel(), generator=self.generator, device=self.device)
            yield Operation("deltas put in and taken out", density, partial(_put_and_take, weight_OI, indices, values))

    def compact_indices(self, densities: Sequence[float]) -> Iterator[Operation]:
        num_positions = self.weight.numel()
        for density in densities:
            indices = self.indices(density)
            num_active = indices.numel()
            low_bytes, high_bits = encode_indices(indices, num_active, num_positions)
            decode = partial(decode_indices, low_bytes, high_bits, num_active, torch.int32)
            yield Operation("compact indices decoded", density, decode)

    def nf4(self, densities: Sequence[float]) -> Iterator[Operation]:
        quantized = quantize_nf4(self.weight, double_quantization=False)
        stored = quantized.packed, quantized.absmax, None
        options: dict[str, Any] = {"shape": self.shape, "dtype": self.dtype}
        yield Operation("NF4: dequantize", None, lambda: dequantize_nf4(*stored, **options))
        for density in densities:
            indices = self.indices(density)
            values = torch.randn(indices.numel(), generator=self.generator, device=self.device)

            def put(indices: Tensor = indices, values: Tensor = values) -> Tensor:
                return apply_deltas_(dequantize_nf4(*stored, **options), indices, values)

            yield Operation("NF4: dequantize, then put deltas", density, put)
            if triton_kernels.available(quantized.packed):
                begins = triton_kernels.tile_begins(indices, self.weight.numel())
                fused = partial(triton_kernels.dequantize_with_deltas, *stored, indices, values, begins=begins)
                yield Operation("NF4: dequantize with deltas", density, partial(fused, **options))


def _remembered(known: dict[int, list[int]], layout: SparseLayout, indices: Tensor, num_rows: int) -> list[int]:
    if num_rows not in known:
        known[num_rows] = layout.row_boundaries(indices, num_rows)
    return known[num_rows]


def _put_and_take(weight_OI: Tensor, indices: Tensor, values: Tensor) -> None:
    with deltas_applied(weight_OI, indices, values):
        pass


def optimizer_steps(num_weights: int, device: torch.device) -> Iterator[Operation]:
    """One step over one flat tensor; torch's own AdamW beside it. SM3's weights lie in matrices [4096, 4096]."""

    def trained() -> Parameter:
        parameter = Parameter(torch.randn(num_weights, device=device))
        parameter.grad = torch.randn(num_weights, device=device)
        return parameter

    for name, options in (("for each", {"foreach": True}), ("fused", {"fused": True})):
        yield Operation(f"torch's AdamW, {name}", None, torch.optim.AdamW([trained()], lr=1e-5, **options).step)
    for moments in ("float32", "bfloat16", "int8"):
        flat = trained()
        adamw = SparseAdamW([flat], lr=1e-5, moments=moments)  # type: ignore[arg-type]
        adamw.register_flat(flat)
        yield Operation(f"AdamW with ages, {moments} moments", None, adamw.step)
    flat = trained()
    sm3 = SparseSM3([flat], lr=1e-5)
    side, per_matrix = 4096, 4096 * 4096 // 100
    segments = []
    for number, offset in enumerate(range(0, num_weights, per_matrix)):
        length = min(per_matrix, num_weights - offset)
        indices = torch.arange(length, dtype=torch.int32, device=device) * 100
        segments.append(FlatSegment(f"matrix{number}", offset, length, side, side, indices=indices))
    sm3.register_flat(flat, segments)

    def step() -> None:
        sm3.step()
        sm3.finish_step()

    yield Operation("SM3", None, step)
