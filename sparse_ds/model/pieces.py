"""What stands between the linear layers of a decoder, as functions that can be exchanged for faster ones.

    piece        what it computes                                          eager, as transformers does it
    rms_norm     x / rms(x) * weight                                       5 kernels, fp32 copies of the activations
    gated        activation(gate) * up                                     2 kernels
    rotary       queries and keys turned by their positions                8 kernels
    head_loss    the loss, from the hidden states                          logits of all tokens, copies in fp32

With a `head_loss` the logits of a micro batch need not exist as a whole (`chunked_loss`).

The linear layers stay what they are: their parameters are gathered by hooks of ZeRO-3 around each module's forward, and
no piece touches a parameter of a module that is not running. So the head, with a `head_loss`, computes the loss inside
its own forward. Norms that train sparsely (`sparse.sparse_vector`) are modules of their own and stay eager.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP, Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralMLP, MistralRMSNorm

RmsNorm = Callable[[Tensor, Tensor, float, bool], Tensor]
"""(hidden [..., D], weight [D], eps, adds_one) -> [..., D]; `adds_one`: multiplied by 1 + weight, in fp32 (Gemma-2)."""
Gated = Callable[[Tensor, Tensor], Tensor]
"""(gate [..., M], up [..., M]) -> [..., M]."""
Rotary = Callable[..., tuple[Tensor, Tensor]]
"""(q [B, heads, T, D], k, cos [B, T, D], sin) -> both, turned."""
Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits [T, V], labels [T]) -> sum over the labels that are not -100, fp32, 0-D."""
HeadLoss = Callable[[Tensor, Tensor, Tensor, Tensor | int, float | None], Tensor]
"""(hidden [T, D], weight [V, D], labels [T], divisor, softcap) -> the sum of `Loss` divided by `divisor`, the number of
trained tokens; `softcap`: of the logits (Gemma-2)."""


@dataclass(frozen=True)
class Pieces:
    """See the module docstring; None: as transformers does it."""

    rms_norm: RmsNorm | None = None
    gated: Callable[[str], Gated | None] | None = None
    """By the name of the activation in config.json."""
    rotary: Rotary | None = None
    head_loss: HeadLoss | None = None


NORMS = {LlamaRMSNorm: False, MistralRMSNorm: False, Gemma2RMSNorm: True}
"""Class -> whether it adds one to its weight."""
MLPS = (LlamaMLP, MistralMLP, Gemma2MLP)


def install_pieces(model: PreTrainedModel, pieces: Pieces) -> None:
    """Let a decoder compute with `pieces`.

    Args:
        model: from `model.build.empty_model`; the forward passes of its modules are replaced. The rotary embedding is a
            function of transformers' module for the architecture: it is replaced for the whole process.
        pieces: what to use.
    """
    config = model.config
    activation = getattr(config, "hidden_act", None) or config.hidden_activation
    gated = None if pieces.gated is None else pieces.gated(activation)
    for module in model.modules():
        if type(module) in NORMS and pieces.rms_norm is not None:
            eps: Any = module.eps if NORMS[type(module)] else module.variance_epsilon
            module.forward = partial(_norm, module, pieces.rms_norm, eps, NORMS[type(module)])
        elif isinstance(module, MLPS) and gated is not None:
            module.forward = partial(_gated_mlp, module, gated)
    if pieces.rotary is not None:
        code: Any = sys.modules[type(model).__module__]
        code.apply_rotary_pos_emb = pieces.rotary
    if getattr(model, "lm_head", None) is None:
        # A classification: its loss is ours (`training.trainer`).
        return
    if pieces.head_loss is not None:
        softcap = getattr(config, "final_logit_softcapping", None)
        model.lm_head.forward = partial(_head, model.lm_head, pieces.head_loss, softcap)
        # transformers looks at the signature of the forward pass.
        model.forward = update_wrapper(partial(_forward_with_loss_in_head, model, model.forward), model.forward)


def shifted_labels(labels_BT: Tensor) -> Tensor:
    """[B * T]: at each position the label of the next one, -100 at the last."""
    return F.pad(labels_BT, (0, 1), value=-100)[:, 1:].reshape(-1)


def _norm(module: nn.Module, rms_norm: RmsNorm, eps: float, adds_one: bool, hidden_states: Tensor) -> Tensor:
    weight: Any = module.weight
    return rms_norm(hidden_states, weight, eps, adds_one)


def _gated_mlp(module: Any, gated: Gated, hidden_states: Tensor) -> Tensor:
    output: Tensor = module.down_proj(gated(module.gate_proj(hidden_states), module.up_proj(hidden_states)))
    return output


def _divisor(labels: Tensor, num_items: Tensor | int | None) -> Tensor | int:
    """The number of trained tokens: of the global batch where it is given, else of these."""
    if num_items is None:
        return (labels != -100).sum()
    return num_items.to(labels.device) if isinstance(num_items, Tensor) else num_items


def _head(
    module: nn.Linear,
    head_loss: HeadLoss,
    softcap: float | None,
    hidden_states: Tensor,
    labels: Tensor | None = None,
    divisor: Tensor | int = 1,
) -> Tensor:
    """The logits, or, where labels are given, the sum of the negative log-likelihoods divided by `divisor`."""
    if labels is None:
        return F.linear(hidden_states, module.weight, module.bias)
    return head_loss(hidden_states.flatten(0, -2), module.weight, labels, divisor, softcap)


def _forward_with_loss_in_head(
    model: Any, forward: Callable[..., Any], *args: Any, labels: Tensor | None = None, **kwargs: Any
) -> Any:
    """The model's forward; with labels in training there are no logits in what it returns."""
    if labels is None or not model.training:
        return forward(*args, labels=labels, **kwargs)
    num_items = kwargs.pop("num_items_in_batch", None)
    outputs = model.model(*args, **kwargs)
    shifted = shifted_labels(labels)
    loss = model.lm_head(outputs.last_hidden_state, labels=shifted, divisor=_divisor(shifted, num_items))
    return CausalLMOutputWithPast(loss=loss)


def eager_rms_norm(hidden_states: Tensor, weight: Tensor, eps: float, adds_one: bool) -> Tensor:
    """As transformers does it: the mean square in fp32, rounded before the weight comes in (1 + weight: after it)."""
    wide = hidden_states.to(torch.float32)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if adds_one:
        return (normed * (1.0 + weight.float())).to(hidden_states.dtype)
    return weight * normed.to(hidden_states.dtype)


def eager_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """As transformers does it."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def eager_loss(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """As transformers does it: in fp32."""
    return F.cross_entropy(logits_TV.float(), labels_T, ignore_index=-100, reduction="sum")


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
