"""The formula against torch's own counter, which counts every product that is really done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
)
from transformers.masking_utils import sliding_window_causal_mask_function

from sparse_ds.model.base_tensors import BaseSettings
from sparse_ds.model.build import SparseSettings, build_sparse_model, plan_layouts, plan_vector_layouts
from sparse_ds.model.classification_head import HeadLinear
from sparse_ds.model.flops import StepFlops, count_flops
from sparse_ds.sparse.sparse_linear import SparseLinear

NUM_ROWS, LENGTH = 3, 7
SIZES: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
}
GROUPED = {"num_key_value_heads": 1, "head_dim": 6, "use_cache": False}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, **GROUPED, attention_bias=True),
    "tied": LlamaConfig(**SIZES, **GROUPED, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**SIZES, **GROUPED),
    "bert": BertConfig(**SIZES),
}
FP32 = BaseSettings(dtype=torch.float32, nf4=False, double_quantization=False, attention="eager")


def sparse_model(config: Any, whole: Any, sparse: SparseSettings) -> PreTrainedModel:
    """Zeros everywhere: products of them are counted as all others."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    model.tie_weights()
    layouts = plan_layouts(model, sparse)
    build_sparse_model(model, layouts, FP32, sparse, whole, plan_vector_layouts(model, layouts, sparse))
    return model.train()


def counted(model: PreTrainedModel, **inputs: Any) -> int:
    """Operations of forward and backward on rows without padding."""
    input_ids = torch.ones(NUM_ROWS, LENGTH, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=input_ids, **inputs).loss.backward()
    total: int = counter.get_total_flops()
    return total


def of_formula(flops: StepFlops) -> float:
    """The same by the formula; eager attention computes what the mask hides too."""
    lengths = torch.full((NUM_ROWS,), LENGTH)
    return flops.of(NUM_ROWS * LENGTH, float(replace(flops, is_causal=False).count_pairs(lengths)))


@pytest.mark.parametrize(
    ("architecture", "sparse"),
    [
        ("llama", SparseSettings("all-linear", 1.0, 0)),
        ("llama", SparseSettings(["q_proj", "k_proj", "v_proj"], 1.0, 0)),
        ("llama", SparseSettings(["layers.1.self_attn.o_proj"], 1.0, 0)),
        ("llama", SparseSettings(["layers.2.mlp.down_proj"], 1.0, 0)),
        ("llama", SparseSettings(["layers.1.mlp.up_proj"], 1.0, 0, train_norms=True)),
        ("llama", SparseSettings([f"layers.1.self_attn.{x}_proj" for x in "qkv"], 1.0, 0, train_biases=True)),
        ("gemma2", SparseSettings("all-linear", 1.0, 0)),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_sparse_training(architecture: str, sparse: SparseSettings, whole: Any) -> None:
    """At density 1 the gradient of the values is the whole weight gradient, which the counter sees."""
    model = sparse_model(CONFIGS[architecture], whole, sparse)
    expected = counted(model, labels=torch.ones(NUM_ROWS, LENGTH, dtype=torch.int64))
    assert of_formula(count_flops(model)) == expected


@pytest.mark.parametrize("architecture", ["llama", "tied"])
def test_everything_trains(architecture: str) -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture], attn_implementation="eager").train()
    expected = counted(model, labels=torch.ones(NUM_ROWS, LENGTH, dtype=torch.int64))
    assert of_formula(count_flops(model)) == expected


def test_an_encoder_without_its_head() -> None:
    config = CONFIGS["bert"]
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").train()
    for name in ("bert.pooler.dense", "classifier"):
        linear = model.get_submodule(name)
        model.set_submodule(name, HeadLinear(linear.weight, linear.bias))
    expected = counted(model, labels=torch.ones(NUM_ROWS, dtype=torch.int64))
    head = 6 * NUM_ROWS * (config.hidden_size**2 + config.hidden_size * config.num_labels)
    assert of_formula(count_flops(model)) == expected - head


def test_sparse_values_cost_their_number(whole: Any) -> None:
    models = {
        density: sparse_model(CONFIGS["llama"], whole, SparseSettings("all-linear", density, 0))
        for density in (0.1, 1.0)
    }
    flops = {density: count_flops(model) for density, model in models.items()}
    layers = [module for module in models[0.1].modules() if isinstance(module, SparseLinear)]
    inactive = sum(layer.layout.num_elements - layer.num_active for layer in layers)
    assert flops[0.1].per_token == flops[1.0].per_token - 2 * inactive
    assert flops[0.1].per_pair == flops[1.0].per_pair


def test_recomputation_is_the_forward_pass_of_the_blocks(whole: Any) -> None:
    """Against the counter on the blocks alone."""
    model = sparse_model(CONFIGS["llama"], whole, SparseSettings("all-linear", 0.5, 0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(NUM_ROWS, LENGTH, dtype=torch.int64))
    head = 2 * NUM_ROWS * LENGTH * SIZES["hidden_size"] * SIZES["vocab_size"]
    flops = count_flops(model)
    pairs = len(flops.windows) * NUM_ROWS * LENGTH**2
    assert flops.recomputed(NUM_ROWS * LENGTH, pairs) == counter.get_total_flops() - head


@pytest.mark.parametrize("lengths", [[1, 2, 3, 4, 5, 9, 30], [4]])
def test_pairs_are_those_that_the_mask_lets_through(lengths: list[int]) -> None:
    def visible(length: int, sees: Callable[..., Any]) -> int:
        return sum(bool(sees(0, 0, query, key)) for query in range(length) for key in range(length))

    def causal(batch: int, head: int, query: int, key: int) -> bool:
        return key <= query

    windowed = sliding_window_causal_mask_function(4)
    flops = StepFlops(0.0, 0.0, 0.0, 0.0, windows=(None, 4, 4), is_causal=True)
    expected = sum(
        visible(length, causal) + 2 * visible(length, lambda *at: windowed(*map(torch.tensor, at)))
        for length in lengths
    )
    assert float(flops.count_pairs(torch.tensor(lengths))) == expected
    everything = replace(flops, is_causal=False, windows=(None, None))
    assert float(everything.count_pairs(torch.tensor(lengths))) == 2 * sum(length**2 for length in lengths)


def test_windows_of_the_architectures() -> None:
    def windows(config: Any) -> tuple[int | None, ...]:
        with torch.device("meta"):
            return count_flops(AutoModelForCausalLM.from_config(config)).windows

    assert windows(CONFIGS["llama"]) == (None, None, None)
    assert windows(MistralConfig(**SIZES, **GROUPED, sliding_window=5)) == (5, 5, 5)
    assert windows(MistralConfig(**SIZES, **GROUPED, sliding_window=None)) == (None, None, None)
    assert windows(Gemma2Config(**SIZES, **GROUPED, sliding_window=5)) == (5, None, 5)


def test_llama_2_7b_is_the_number_of_its_weights() -> None:
    """Forward and input gradient of a frozen base: 4 N a token, where training all of it takes 6 N."""
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    num_weights = sum(each.weight.numel() for each in model.modules() if isinstance(each, nn.Linear))
    assert count_flops(model).per_token == 6 * num_weights
    model.requires_grad_(False)
    assert count_flops(model).per_token == 2 * num_weights
