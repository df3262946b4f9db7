"""The loss in the head, some tokens at a time: the logits of a micro batch never exist as a whole.

Forward computes the logits of a chunk of tokens, their loss and its gradient with respect to the hidden states, and
keeps that gradient alone, which is as large as the hidden states. The arithmetic in a chunk is that of the eager head
and loss, with one rounding of the gradient at the same place.

`torch.nn.functional.linear_cross_entropy` (2.13) does the same, but in bf16 on the CPU it casts the weight and
multiplies in fp32, and it knows no soft caps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_ds.model.pieces import HeadLoss, Loss

CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**24}
"""Logits at a time. They and what is derived from them take 12 bytes each: 50 MB, on a GPU (not measured) 200 MB. Twice
as many would save 3 % (bf16) or 5 % (fp32) of a step of 4 layers on the CPU, but be the peak in a short model."""


def chunked_head_loss(loss: Loss) -> HeadLoss:
    """`loss`, which sees the logits, as one that sees the hidden states.

    A weight that trains gets its gradient from the logits as a whole: a gradient of its size for each chunk would cost
    more than is won.
    """

    def head_loss(
        hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, divisor: Tensor | int, softcap: float | None
    ) -> Tensor:
        if torch.is_grad_enabled() and hidden_TD.requires_grad and not weight_VD.requires_grad:
            mean: Tensor = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
                hidden_TD, weight_VD, labels_T, divisor, softcap, loss
            )
            return mean
        return loss(_logits(hidden_TD, weight_VD, softcap), labels_T) / divisor

    return head_loss


def _logits(hidden_TD: Tensor, weight_VD: Tensor, softcap: float | None) -> Tensor:
    logits_TV = F.linear(hidden_TD, weight_VD)
    return logits_TV if softcap is None else torch.tanh(logits_TV / softcap) * softcap


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        divisor: Tensor | int,
        softcap: float | None,
        loss: Loss,
    ) -> Tensor:
        num_tokens, vocabulary_size = hidden_TD.shape[0], weight_VD.shape[0]
        chunk_elements = CHUNK_ELEMENTS.get(hidden_TD.device.type, 2**24)
        num_chunks = math.ceil(num_tokens * vocabulary_size / chunk_elements)
        gradient_TD = torch.empty_like(hidden_TD)
        total = torch.zeros((), device=hidden_TD.device)
        chunks = [tensor.chunk(num_chunks) for tensor in (hidden_TD, labels_T, gradient_TD)]
        for hidden_CD, labels_C, gradient_CD in zip(*chunks, strict=True):
            with torch.enable_grad():
                leaf_CD = hidden_CD.detach().requires_grad_()
                share = loss(_logits(leaf_CD, weight_VD.detach(), softcap), labels_C) / divisor
            gradient_CD.copy_(*torch.autograd.grad(share, leaf_CD))
            total += share.detach()
        ctx.save_for_backward(gradient_TD)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_TD,) = ctx.saved_tensors
        return (gradient_TD * grad_outputs[0].to(gradient_TD.dtype), None, None, None, None, None)
