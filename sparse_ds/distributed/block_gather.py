"""Transformer blocks as the unit of ZeRO-3's gathering: all tensors of a block are fetched and released together.

By itself DeepSpeed fetches module by module. With activation checkpointing it then gathers a frozen base three times a
micro batch: what is gathered to compute a block again is released after the first product of its backward and gathered
anew for every other one. A block that is a "leaf" for DeepSpeed is fetched as a whole:

    forward                     one all-gather a block, begun while the block before it computes
    backward                    one all-gather a block; with activation checkpointing it serves the recomputation too
    gradients of the values     reduced when the backward of the block is done

Memory: the tensors of the block at work and of the next one, and the gradients of one block's values.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.utils.z3_leaf_module import set_z3_leaf_module
from torch import Tensor, nn


def gather_as_one(block: nn.Module) -> None:
    """Let DeepSpeed fetch the tensors of `block` together; before the engine is made.

    Args:
        block: its first positional argument is the hidden state.
    """
    set_z3_leaf_module(block, True)
    if any(parameter.requires_grad for parameter in block.parameters()):
        block.register_forward_pre_hook(_let_input_require_gradient)


def _let_input_require_gradient(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """DeepSpeed reduces the gradients of a leaf when the gradient of its input is there: the first block's too, whose
    input comes from a frozen embedding. The price is the input gradient of that block."""
    hidden_state: Tensor = args[0]
    if hidden_state.requires_grad or not torch.is_grad_enabled():
        return None
    return (hidden_state.detach().requires_grad_(), *args[1:])
