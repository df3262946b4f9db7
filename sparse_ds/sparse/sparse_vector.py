"""Vectors of which only K entries train: biases of target layers, and the weights of norms.

    tensor    shape / dtype              trains   ZeRO-3
    weight    [D] bf16 or fp32           no       partitioned     never quantized
    indices   [K] int32, ascending       no       partitioned
    values    [K] fp32                   yes      partitioned

    forward     w' = round(fp32 w + fp32 values at indices)       a new tensor; `weight` is never edited
    backward    d values = d w' at indices

To all that holds deltas (checkpoints, adapter, optimizer) such a vector is a matrix of D rows and one column. The only
thing kept for backward is a copy of the K indices: the gathered parameters are released in between.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from sparse_ds.kernels.apply_deltas import apply_deltas_, hidden_counts
from sparse_ds.sparse.layout import SparseLayout


class SparseVector(nn.Module):
    """A bias: its forward gives the merged vector. The parameters are made elsewhere, already partitioned.

    Args:
        layout: D rows, 1 column, K active.
        tensors: the parameters by the names of the table above.
    """

    weight: Parameter
    indices: Parameter
    values: Parameter

    def __init__(self, layout: SparseLayout, tensors: dict[str, Parameter]) -> None:
        super().__init__()
        assert layout.num_cols == 1 and layout.spare_slots == 0
        self.layout = layout
        self.num_active = layout.num_active
        """K; no event changes it."""
        self.count_hidden = False
        """Count hidden deltas in the next forward passes (evaluation turns it on)."""
        self.hidden_deltas: tuple[int, int] = (0, 0)
        """(hidden, non-zero) deltas at the last counted forward pass."""
        for name in ("weight", "indices", "values"):
            self.register_parameter(name, tensors[name])

    def forward(self) -> Tensor:
        """[D] in the dtype of `weight`."""
        return self.merged()

    def merged(self) -> Tensor:
        """[D], differentiable in `values`. Parameters must be gathered."""
        merged_D: Tensor = _MergedVector.apply(self.values, self)  # type: ignore[no-untyped-call]
        return merged_D

    @property
    def active_indices(self) -> Tensor:
        """[K] of the gathered indices."""
        return self.indices.data[: self.num_active]

    def indices_changed(self) -> None:
        """Drop what is cached about the indices; called by everything that writes them."""

    def extra_repr(self) -> str:
        return f"{self.layout.num_rows}, active={self.num_active}"


class SparseRMSNorm(SparseVector):
    """The RMS norm of Llama, Mistral and Gemma-2 with a sparsely trained weight.

    Args:
        layout, tensors: as for `SparseVector`.
        eps: added to the mean square.
        adds_one: the norm multiplies by 1 + weight, in fp32 (Gemma-2), instead of by the weight.
    """

    def __init__(self, layout: SparseLayout, tensors: dict[str, Parameter], eps: float, adds_one: bool = False) -> None:
        super().__init__(layout, tensors)
        self.variance_epsilon = eps
        self.adds_one = adds_one

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """[..., D] -> [..., D]; the mean square in fp32, rounded before the weight comes in (1 + weight: after it), as
        transformers does."""
        wide = hidden_states.to(torch.float32)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        if self.adds_one:
            return (normed * (1.0 + self.merged().to(torch.float32))).to(hidden_states.dtype)
        return self.merged() * normed.to(hidden_states.dtype)


class SparseLayerNorm(SparseVector):
    """The LayerNorm of BERT and RoBERTa with a sparsely trained weight; its bias [D] is frozen.

    Args:
        layout, tensors: as for `SparseVector`.
        bias: [D], partitioned, in the dtype of `weight`.
        eps: added to the variance.
    """

    bias: Parameter

    def __init__(self, layout: SparseLayout, tensors: dict[str, Parameter], bias: Parameter, eps: float) -> None:
        super().__init__(layout, tensors)
        self.register_parameter("bias", bias)
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """[..., D] -> [..., D]."""
        return F.layer_norm(hidden_states, (self.layout.num_rows,), self.merged(), self.bias, self.eps)


class _MergedVector(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, vector: SparseVector) -> Tensor:
        weight_D, indices_K = vector.weight.data, vector.active_indices.clone()
        ctx.save_for_backward(indices_K)
        if vector.count_hidden:
            vector.hidden_deltas = hidden_counts(weight_D.index_select(0, indices_K), values)
        return apply_deltas_(weight_D.clone(), indices_K, values)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (indices_K,) = ctx.saved_tensors
        return grad_output.index_select(0, indices_K).to(torch.float32), None
