"""Floating-point operations that one training step needs: by a formula, from the shapes of the model.

Of a linear layer with N = O * I weights, for each token:

    forward             2 N
    input gradient      2 N       where something that trains lies before the layer, else nothing
    weight gradient     2 N where all of it trains, 2 K where K of its weights do, nothing where it is frozen

The usual 6 N a token is that of a model of which every weight trains. Of attention, for each query and each key that it
sees (in a causal model those up to the query itself, within the window if there is one, of the same sample only):

    forward             4 * heads * head size         queries with keys, probabilities with values
    gradients           twice that                    where a gradient passes (of the first block with one: all three)

Counted is what the mathematics needs, whatever is done: no padding, no masked half of attention, no weight gradient
that is computed and not used, no estimation of gradients for events. `recomputed` is apart: activation checkpointing
does the forward pass of every block a second time. Not counted: all that is no matrix product (norms, rotary embedding,
softmax, loss, optimizer), embeddings, and the head of a classification (a few labels wide).

Model FLOPs utilization: Chowdhery et al., "PaLM", arXiv 2204.02311, appendix B. Differs from there: a causal query is
not counted as seeing all keys, and frozen weights have no gradient.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from sparse_ds.model.kinds import KINDS
from sparse_ds.model.targets import find_norms, is_in_block
from sparse_ds.sparse.sparse_linear import SparseLinear
from sparse_ds.sparse.sparse_vector import SparseVector

_OF_QUERY = re.compile(r"\.(q|k|v)_proj$|\.(query|key|value)$")
_OF_GATE = re.compile(r"\.(gate|up)_proj$")


@dataclass(frozen=True)
class StepFlops:
    """What a token, and a query with a key that it sees, cost; one micro batch costs the sum of both."""

    per_token: float
    per_pair: float
    """Of one layer's attention, all heads."""
    recomputed_per_token: float
    """What activation checkpointing does once more."""
    recomputed_per_pair: float
    windows: tuple[int | None, ...]
    """Of each attention layer: how many tokens a query sees at most, itself included; None: no limit."""
    is_causal: bool

    def of(self, num_tokens: float, num_pairs: float) -> float:
        """Operations that are needed for so many tokens and pairs (`count_pairs`)."""
        return self.per_token * num_tokens + self.per_pair * num_pairs

    def recomputed(self, num_tokens: float, num_pairs: float) -> float:
        """Operations that activation checkpointing adds."""
        return self.recomputed_per_token * num_tokens + self.recomputed_per_pair * num_pairs

    def count_pairs(self, lengths: Tensor) -> Tensor:
        """Queries with the keys that they see, over all samples and layers: fp64, 0-D, on the device of `lengths`.

        Args:
            lengths: tokens of every sample, integers of any shape.
        """
        lengths = lengths.double()
        num_pairs = torch.zeros((), dtype=torch.float64, device=lengths.device)
        for window in set(self.windows):
            if self.is_causal:
                # The first tokens see 1, 2, 3, ... keys, those behind the window all as many.
                rising = lengths if window is None else lengths.clamp(max=window)
                seen = rising * (rising + 1) / 2 + (lengths - rising) * rising
            else:
                seen = lengths.square()
            num_pairs += self.windows.count(window) * seen.sum()
        return num_pairs


def count_flops(model: PreTrainedModel) -> StepFlops:
    """Of a model that is ready to train (`training.setup.prepare_model`); its parameters may be partitioned."""
    config = model.config
    # Whether anything that trains lies before the layers that come next.
    gradient_reaches = model.get_input_embeddings().weight.requires_grad or any(
        isinstance(model.get_submodule(name), SparseVector) for name in find_norms(model)
    )
    per_token = recomputed = 0.0
    num_attentions_back = 0
    for stage in _stages(model):
        trains = False
        for name, linear in stage:
            num_weights = linear.in_features * linear.out_features
            num_trained = _num_trained(linear, num_weights)
            per_token += 2 * num_weights * (1 + gradient_reaches) + 2 * num_trained
            recomputed += 2 * num_weights if is_in_block(name) else 0
            trains = trains or num_trained > 0 or _trains_bias(linear)
        gradient_reaches = gradient_reaches or trains
        num_attentions_back += bool(gradient_reaches and _OF_QUERY.search(stage[0][0]))
    windows = _windows(config)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    forward = 4.0 * config.num_attention_heads * head_size
    return StepFlops(
        per_token=per_token,
        # Blocks before all that trains have no gradient; here their part is spread over all blocks.
        per_pair=forward * (1 + 2 * num_attentions_back / len(windows)),
        recomputed_per_token=recomputed,
        recomputed_per_pair=forward,
        windows=windows,
        is_causal=not KINDS[config.model_type].is_encoder,
    )


def _stages(model: nn.Module) -> list[list[tuple[str, nn.Linear | SparseLinear]]]:
    """The linear layers in the order of the forward pass; those of one input are one stage."""
    stages: list[list[tuple[str, nn.Linear | SparseLinear]]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | SparseLinear):
            continue
        previous = stages[-1][-1][0] if stages else ""
        if any(pattern.search(name) and pattern.search(previous) for pattern in (_OF_QUERY, _OF_GATE)):
            stages[-1].append((name, module))
        else:
            stages.append([(name, module)])
    return stages


def _num_trained(linear: nn.Linear | SparseLinear, num_weights: int) -> int:
    if isinstance(linear, SparseLinear):
        return linear.num_active
    return num_weights if linear.weight.requires_grad else 0


def _trains_bias(linear: nn.Linear | SparseLinear) -> bool:
    bias = linear.bias
    return isinstance(bias, SparseVector) or (bias is not None and bias.requires_grad)


def _windows(config: PretrainedConfig) -> tuple[int | None, ...]:
    window: int | None = getattr(config, "sliding_window", None)
    every_layer = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or every_layer
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
