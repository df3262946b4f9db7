"""The pieces between the linear layers as Triton kernels of the package liger-kernel (LinkedIn, BSD 2-Clause).

Only its kernels are used. Its own way into a model (`_apply_liger_kernel_to_instance`, which is also that of
transformers' `use_liger_kernel`) exchanges classes of transformers for the whole process, takes norms that train
sparsely for ordinary ones, and reads the head's weight outside of the head's forward, where ZeRO-3 has not gathered it.

The loss runs over the tokens in chunks, inside the head: the logits of all tokens never exist, and the gradient of the
hidden states is computed on the way, so that the head's weight is not needed in backward. It counts the trained tokens
of each micro batch on the host (one wait for the device).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sparse_ds.config.errors import UserError
from sparse_ds.model.pieces import Gated, Pieces


def liger_pieces() -> Pieces:
    """The kernels, for tensors on a GPU.

    Raises:
        UserError: the package is not here, or too old.
    """
    try:
        ops: Any = import_module("liger_kernel.ops")
        functional: Any = import_module("liger_kernel.transformers.functional")
        rotary: Any = import_module("liger_kernel.transformers.rope").liger_rotary_pos_emb
    except ImportError as error:
        raise UserError(
            f"model.liger_kernels: got true, but the package liger-kernel cannot be used here ({error}). Install it "
            "(`pip install liger-kernel`, 0.8 or later), or set model.liger_kernels to false."
        ) from error

    def rms_norm(hidden_states: Tensor, weight: Tensor, eps: float, adds_one: bool) -> Tensor:
        offset, casting = (1.0, "gemma") if adds_one else (0.0, "llama")
        # Not in place: the gradient of the output may be that of a residual too (Gemma-2).
        normed: Tensor = ops.LigerRMSNormFunction.apply(hidden_states, weight, eps, offset, casting, False, None)
        return normed

    def silu_gated(gate: Tensor, up: Tensor) -> Tensor:
        product: Tensor = ops.LigerSiLUMulFunction.apply(gate, up, 1.0, 1.0)
        return product

    def gelu_gated(gate: Tensor, up: Tensor) -> Tensor:
        product: Tensor = ops.LigerGELUMulFunction.apply(gate, up)
        return product

    def gated(activation: str) -> Gated | None:
        return {"silu": silu_gated, "swish": silu_gated, "gelu_pytorch_tanh": gelu_gated}.get(activation)

    def head_loss(
        hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, divisor: Tensor | int, softcap: float | None
    ) -> Tensor:
        total: Tensor = functional.liger_fused_linear_cross_entropy(
            hidden_TD,
            weight_VD,
            labels_T,
            ignore_index=-100,
            reduction="sum",
            softcap=softcap,
            # Of the head's own gradient, where it trains: summed over the chunks in fp32.
            accum_dtype=torch.float32,
        )
        return total / divisor

    return Pieces(rms_norm, gated, rotary, head_loss=head_loss)
