"""A linear layer of which only K weights train: frozen base, plus deltas that are put in for the time of a product.

    tensor      shape / dtype                       trains   ZeRO-3
    weight      [O, I] bf16 or fp32                 no       partitioned          16-bit (or fp32) base
    packed      [ceil(N / 2)] uint8                 no       partitioned  \\
    absmax      [ceil(N / 64)] fp32 or uint8        no       partitioned   NF4 base (`kernels.nf4`)
    nested_statistics  [...] fp32, optional         no       partitioned  /
    indices     [S / e] int32 or int64, ascending   no       partitioned   (e weights a block, `SparseLayout`)
    index_low_bytes, index_high_bits   uint8        no       partitioned   instead of them, `sparse.compact_indices`
    values      [S] fp32                            yes      partitioned
    bias        [O], optional                       no       partitioned   (or a `SparseVector` of its own)

    forward     Y = X W'^T            W' = round(fp32 W + fp32 values at indices)
    backward    dX = dY W'            W' rebuilt the same way from the gathered parameters
                d values = (dY^T X) at indices, without the dense product as a whole

Of the S slots the first K = `num_active` hold the active weights. Only where events may move weights between matrices,
or to fill up a rank's last block, are there more; slots behind K are 0, get the gradient 0 and have no effect.

All parameters belong to the layer itself, so DeepSpeed gathers them together before its forward and its backward and
releases them after. Rules that keep this safe under prefetch, persistence, offload and activation checkpointing: only
`weight.data` is edited, only inside the autograd function, restored in any case (with one rank the gathered buffer is
the partition); no parameter is saved for backward, only the input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from sparse_ds.kernels import triton_kernels
from sparse_ds.kernels.apply_deltas import apply_deltas_, deltas_applied, hidden_counts
from sparse_ds.kernels.crossover import AUTO, PathChoice
from sparse_ds.kernels.nf4 import dequantize_nf4
from sparse_ds.kernels.product_operands import InputUse, ProductOperands, use_input
from sparse_ds.sparse.compact_indices import decode_indices
from sparse_ds.sparse.gradient_at import gradient_at
from sparse_ds.sparse.layout import SparseLayout
from sparse_ds.sparse.sparse_vector import SparseVector

ObserveGradient = Callable[[ProductOperands], None]
"""`observe(operands)`: what the dense weight gradient is made of; not to be kept beyond the call."""


BASE_TENSORS = ("weight", "packed", "absmax", "nested_statistics")
INDEX_TENSORS = ("indices", "index_low_bytes", "index_high_bits")


class SparseLinear(nn.Module):
    """See the module docstring. The parameters are made elsewhere (`model.build`), already partitioned.

    Args:
        layout: shape and number of active weights.
        compute_dtype: dtype of the dense base, of the input and of the output.
        tensors: the parameters by the names of the table above.
        sparse_bias: the bias, where entries of it train; `tensors` then has none.
    """

    weight: Parameter | None
    packed: Parameter | None
    absmax: Parameter | None
    nested_statistics: Parameter | None
    indices: Parameter | None
    index_low_bytes: Parameter | None
    index_high_bits: Parameter | None
    values: Parameter
    bias: Parameter | SparseVector | None

    def __init__(
        self,
        layout: SparseLayout,
        compute_dtype: torch.dtype,
        tensors: dict[str, Parameter],
        sparse_bias: SparseVector | None = None,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.in_features, self.out_features = layout.num_cols, layout.num_rows
        self.compute_dtype = compute_dtype
        self.count_hidden = False
        """Count hidden deltas in the next forward passes (evaluation turns it on)."""
        self.hidden_deltas: tuple[int, int] = (0, 0)
        """(hidden, non-zero) deltas at the last counted forward pass."""
        self.num_active = layout.num_active
        """K now."""
        self.observe_gradient: ObserveGradient | None = None
        """Called in backward with what the dense weight gradient is made of; an estimation phase sets it."""
        self.path_choice: PathChoice = AUTO
        """How the gradient of the values is computed."""
        self.held_weight: Tensor | None = None
        """[O, I] the base with the deltas in it, while they are held (`held_deltas`)."""
        self._row_boundaries: dict[int, list[int]] = {}
        self._tile_begins: Tensor | None = None
        for name in (*BASE_TENSORS, *INDEX_TENSORS, "values"):
            self.register_parameter(name, tensors.get(name))
        if sparse_bias is None:
            self.register_parameter("bias", tensors.get("bias"))
        else:
            self.bias = sparse_bias

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        bias_O = self.bias() if isinstance(self.bias, SparseVector) else self.bias
        output: Tensor = _SparseLinearFunction.apply(  # type: ignore[no-untyped-call]
            input, self.values, bias_O, self, use_input(input)
        )
        return output

    def extra_repr(self) -> str:
        base = "nf4" if self.packed is not None else str(self.compute_dtype).removeprefix("torch.")
        return f"in={self.in_features}, out={self.out_features}, active={self.num_active}, base={base}"

    @property
    def active_indices(self) -> Tensor:
        """[K / e] of the gathered indices; decoded anew at every access where they are stored compactly."""
        num_active = self.num_active // self.layout.block_elements
        if self.indices is not None:
            return self.indices.data[:num_active]
        assert self.index_low_bytes is not None and self.index_high_bits is not None
        layout, low_bytes_S = self.layout, self.index_low_bytes.data
        return decode_indices(
            low_bytes_S[:num_active], self.index_high_bits.data, layout.num_index_slots, layout.index_dtype
        )

    def indices_changed(self) -> None:
        """To be called after every change of `indices` or `num_active`: what is known about them is dropped."""
        self._row_boundaries.clear()
        self._tile_begins = None

    def row_boundaries(self, rows_per_block: int) -> list[int]:
        """`SparseLayout.row_boundaries` of the active indices, which must be gathered if they are not known yet.

        One device synchronization, at the first call after the indices changed.
        """
        if rows_per_block not in self._row_boundaries:
            self._row_boundaries[rows_per_block] = self.layout.row_boundaries(self.active_indices, rows_per_block)
        return self._row_boundaries[rows_per_block]

    @contextmanager
    def merged_weight(self, active_indices: Tensor | None = None) -> Iterator[Tensor]:
        """Within the context: W' [O, I]. Parameters must be gathered. A dense base is edited and restored.

        `active_indices`: those of the layer, where they are at hand.
        """
        if self.held_weight is not None:
            yield self._held()
            return
        indices_K = self.active_indices if active_indices is None else active_indices
        indices_K, values_K = self.in_strips(indices_K, self.values.data[: self.num_active])
        if self.packed is not None:
            yield self._dequantized(indices_K, values_K)
        else:
            assert self.weight is not None
            self._note_hidden(self.weight.data, indices_K, values_K)
            with deltas_applied(self.weight.data, indices_K, values_K) as weight_OI:
                yield weight_OI

    def in_strips(self, indices_U: Tensor, values_K: Tensor) -> tuple[Tensor, Tensor]:
        """Active indices and values as they go into a buffer: with blocks, strips of neighbours (`apply_deltas`)."""
        if self.layout.block_elements == 1:
            return indices_U, values_K
        return self.layout.strips_of(indices_U), values_K.view(-1, self.layout.block_cols)

    def _held(self) -> Tensor:
        assert self.held_weight is not None and self.weight is not None
        if self.weight.data.data_ptr() != self.held_weight.data_ptr():
            raise RuntimeError(
                "the weight that was gathered for a product is not the one that holds the deltas: DeepSpeed has copied "
                "it. This is a defect of sparse_ds or a version of DeepSpeed that it does not know."
            )
        return self.weight.data

    def _dequantized(self, indices_K: Tensor, values_K: Tensor) -> Tensor:
        """W' [O, I] of a 4-bit base, a new tensor."""
        assert self.packed is not None and self.absmax is not None
        shape, dtype = (self.layout.num_rows, self.layout.num_cols), self.compute_dtype
        nested = None if self.nested_statistics is None else self.nested_statistics.data
        stored = self.packed.data, self.absmax.data, nested
        if triton_kernels.available(self.packed) and not self.count_hidden:
            if self._tile_begins is None and values_K.dim() == 1:
                self._tile_begins = triton_kernels.tile_begins(indices_K, self.layout.num_elements)
            return triton_kernels.dequantize_with_deltas(
                *stored, indices_K, values_K, shape=shape, dtype=dtype, begins=self._tile_begins
            )
        weight_OI = dequantize_nf4(*stored, shape=shape, dtype=dtype)
        self._note_hidden(weight_OI, indices_K, values_K)
        return apply_deltas_(weight_OI, indices_K, values_K)

    def _note_hidden(self, weight_OI: Tensor, indices_K: Tensor, values_K: Tensor) -> None:
        if self.count_hidden:
            self.hidden_deltas = hidden_counts(
                weight_OI.view(-1, *values_K.shape[1:]).index_select(0, indices_K), values_K
            )


class _SparseLinearFunction(torch.autograd.Function):
    """The product and its gradients; `layer` carries the gathered parameters (not saved: they are released)."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, values: Tensor, bias_O: Tensor | None, layer: SparseLinear, input_use: InputUse
    ) -> Tensor:
        ctx.layer, ctx.input_use = layer, input_use
        ctx.save_for_backward(input)
        with layer.merged_weight() as weight_OI:
            # The bias inside the product, as in nn.Linear: in 16 bits the sum is rounded once.
            return F.linear(input, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (input,) = ctx.saved_tensors
        layer: SparseLinear = ctx.layer
        layout = layer.layout
        grad_input = grad_values = grad_bias = None
        indices_U = layer.active_indices if ctx.needs_input_grad[0] or ctx.needs_input_grad[1] else None
        # The values first: the transposes that it takes are gone before the gradient of the input is there.
        if ctx.needs_input_grad[1]:
            assert indices_U is not None
            operands = ProductOperands(
                grad_output.reshape(-1, layout.num_rows), input.reshape(-1, layout.num_cols), ctx.input_use
            )
            if layer.observe_gradient is not None:
                layer.observe_gradient(operands)
            grad_values = gradient_at(layout, operands, indices_U, layer.row_boundaries, choice=layer.path_choice)
            operands.done()
            if layout.num_stored > layer.num_active:
                grad_values = F.pad(grad_values, (0, layout.num_stored - layer.num_active))
        if ctx.needs_input_grad[0]:
            with layer.merged_weight(indices_U) as weight_OI:
                grad_input = grad_output.matmul(weight_OI)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_output.reshape(-1, layout.num_rows).sum(0)
        return grad_input, grad_values, grad_bias, None, None


SparseLayer = SparseLinear | SparseVector
"""Everything that holds deltas: `layout`, `indices`, `values`, `num_active`."""
