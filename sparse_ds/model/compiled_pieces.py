"""The pieces between the linear layers, compiled by torch: C++ on the CPU, Triton on a GPU.

Only these functions of tensors are compiled, not the model or its blocks. Around every module with parameters DeepSpeed
runs hooks that gather and release them, and it marks them as not to be traced (`torch.compiler.disable`): a compiled
model would break into the same pieces at each of them, with a check of the module's state in front of every piece.

Compiled once for all shapes (`dynamic=True`): micro batches have many lengths. The arithmetic is that of the eager
pieces; in bf16 values that eager rounds in between stay in fp32, so results differ by such roundings.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from sparse_ds.config.errors import UserError
from sparse_ds.model.chunked_loss import chunked_head_loss
from sparse_ds.model.pieces import Gated, Pieces, eager_loss, eager_rms_norm, eager_rotary


def compiled_pieces(device: torch.device) -> Pieces:
    """The functions, compiled when they are first called for training; without gradients they run eager.

    Args:
        device: where the model trains.

    Raises:
        UserError: there is no compiler for it.
    """
    _check_compiler(device)

    def gated(activation: str) -> Gated:
        function = ACT2FN[activation]

        def gated_activation(gate: Tensor, up: Tensor) -> Tensor:
            product: Tensor = function(gate) * up
            return product

        return _compiled(gated_activation)

    return Pieces(
        rms_norm=_compiled(eager_rms_norm),
        gated=gated,
        rotary=_compiled(eager_rotary),
        head_loss=chunked_head_loss(_compiled(eager_loss)),
    )


Function = TypeVar("Function", bound=Callable[..., Any])


def _compiled(function: Function) -> Function:
    """Evaluation and sample answers come with shapes of their own, and would only compile: they run eager."""
    compiled = torch.compile(function, dynamic=True)

    @wraps(function)
    def call(*args: Any) -> Any:
        return compiled(*args) if torch.is_grad_enabled() else function(*args)

    return cast(Function, call)


def _check_compiler(device: torch.device) -> None:
    try:
        compiled = torch.compile(lambda x: x * 2 + 1, dynamic=True)
        fits = torch.equal(compiled(torch.ones(8, device=device)), torch.full((8,), 3.0, device=device))
    except Exception as error:  # whatever the compiler finds
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"train.compile: got true, but torch cannot compile for {device.type} here ({type(error).__name__}: "
            f"{reason}). Install a C++ compiler (CPU) or triton (GPU), or set train.compile to false."
        ) from error
    assert fits
