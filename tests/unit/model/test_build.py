"""Building the model: equal to transformers' own before training, and every defect of the base said in words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_doubles import MakeCheckpoint, load
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from sparse_ds.config.errors import UserError
from sparse_ds.kernels.nf4 import dequantize_nf4, quantize_nf4
from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.model.base_tensors import BaseSettings
from sparse_ds.model.build import (
    SparseSettings,
    build_dense_model,
    build_sparse_model,
    empty_model,
    plan_layouts,
    plan_vector_layouts,
)
from sparse_ds.selection.bernoulli_subset import bernoulli_subset
from sparse_ds.selection.random_subset import random_subset
from sparse_ds.sparse.index_storage import are_compact, index_parameters
from sparse_ds.sparse.sparse_linear import SparseLayer, SparseLinear

FP32 = BaseSettings(dtype=torch.float32, nf4=False, double_quantization=False, attention="eager")
ALL = SparseSettings("all-linear", density=0.1, seed=3)
TOKENS = torch.arange(14).view(2, 7)
UP = "model.layers.1.mlp.up_proj"
NORM = "model.norm.weight"


def build(folder: Path, whole: Any, base: BaseSettings = FP32, sparse: SparseSettings = ALL) -> PreTrainedModel:
    checkpoint = BaseCheckpoint(folder)
    model = empty_model(checkpoint, base)
    layouts = plan_layouts(model, sparse)
    load(checkpoint, model, layouts, base, lambda: build_sparse_model(model, layouts, base, sparse, whole))
    return model


@pytest.mark.parametrize(
    "sizes",
    [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}],
    ids=["plain", "tied", "biases"],
)
def test_before_training_it_is_the_base_model(
    make_checkpoint: MakeCheckpoint, whole: Any, sizes: dict[str, Any]
) -> None:
    folder = make_checkpoint(**sizes)
    expected = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model = build(folder, whole)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    assert len(layers) == 14
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {f"{name}.values" for name in layers}
    for name, layer in layers.items():
        subset = random_subset(layer.layout.num_elements, layer.layout.num_active, seed=3, name=name)
        assert torch.equal(layer.indices.long(), subset) and layer.indices.dtype == torch.int32
        assert layer.values.dtype == torch.float32 and not layer.values.any()


def test_bernoulli_indices_are_the_drawn_ones(make_checkpoint: MakeCheckpoint, whole: Any) -> None:
    sparse = SparseSettings("all-linear", density=0.2, seed=3, bernoulli=True)
    model = build(make_checkpoint(), whole, sparse=sparse)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    for name, layer in layers.items():
        subset = bernoulli_subset(layer.layout.num_elements, 0.2, seed=3, name=name)
        assert torch.equal(layer.indices.long(), subset)
        assert layer.num_active == layer.layout.num_active == subset.numel() == layer.values.numel()
    exact = [int(0.2 * layer.layout.num_elements) for layer in layers.values()]
    assert [layer.num_active for layer in layers.values()] != exact


def test_spare_slots_lie_behind_the_active_weights(make_checkpoint: MakeCheckpoint, whole: Any) -> None:
    folder = make_checkpoint()
    sparse = SparseSettings("all-linear", density=0.3, seed=3, slots_per_active=2.5)
    model = build(folder, whole, sparse=sparse)
    for name, layer in model.named_modules():
        if not isinstance(layer, SparseLinear):
            continue
        num_active = layer.num_active
        assert num_active == math.floor(Fraction("0.3") * layer.layout.num_elements)
        assert layer.layout.num_slots == math.floor(2.5 * num_active) == layer.indices.numel() == layer.values.numel()
        subset = random_subset(layer.layout.num_elements, num_active, seed=3, name=name)
        assert torch.equal(layer.indices[:num_active].long(), subset)
        assert not layer.indices[num_active:].any() and not layer.values.any()
    expected = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)


@pytest.mark.parametrize("slots_per_active", [1.0, 2.5])
def test_compact_indices_are_the_same(make_checkpoint: MakeCheckpoint, whole: Any, slots_per_active: float) -> None:
    """Those of matrices; a norm's stay int32."""
    sparse = SparseSettings("all-linear", 0.3, seed=3, slots_per_active=slots_per_active, train_norms=True)
    folder, layers = make_checkpoint(), []
    for each in (sparse, dataclasses.replace(sparse, index_storage="compact")):
        checkpoint = BaseCheckpoint(folder)
        model = empty_model(checkpoint, FP32)
        layouts = plan_layouts(model, each)
        vectors = plan_vector_layouts(model, layouts, each)
        build_sparse_model(model, layouts, FP32, each, whole, vectors)
        layers.append({name: module for name, module in model.named_modules() if isinstance(module, SparseLayer)})
    plain, compact = layers
    assert plain.keys() == compact.keys() and len(plain) == 14 + 5
    for name, layer in compact.items():
        assert torch.equal(layer.active_indices, plain[name].active_indices)
        assert layer.active_indices.dtype == torch.int32
        assert are_compact(layer) == isinstance(layer, SparseLinear) != ("indices" in index_parameters(layer))
        assert all(not parameter.requires_grad for parameter in index_parameters(layer).values())


def test_a_matrix_has_no_more_slots_than_weights(make_checkpoint: MakeCheckpoint) -> None:
    model = empty_model(BaseCheckpoint(make_checkpoint()), FP32)
    for layout in plan_layouts(model, SparseSettings("all-linear", 0.5, seed=0, slots_per_active=7.0)).values():
        assert layout.num_slots == layout.num_elements


@pytest.mark.parametrize("double_quantization", [False, True])
def test_nf4_layers_hold_the_quantized_weight(
    make_checkpoint: MakeCheckpoint, whole: Any, double_quantization: bool
) -> None:
    folder = make_checkpoint()
    base = BaseSettings(torch.bfloat16, nf4=True, double_quantization=double_quantization, attention="sdpa")
    model = build(folder, whole, base, SparseSettings(["up_proj"], density=0.1, seed=0))
    layer = model.get_submodule(UP)
    assert isinstance(layer, SparseLinear) and layer.weight is None
    quantized = quantize_nf4(BaseCheckpoint(folder).read(f"{UP}.weight"), double_quantization=double_quantization)
    expected = dequantize_nf4(
        quantized.packed, quantized.absmax, quantized.nested_statistics, shape=(18, 12), dtype=torch.bfloat16
    )
    with torch.no_grad(), layer.merged_weight() as merged:
        assert torch.equal(merged, expected)
    assert isinstance(model.get_submodule("model.layers.1.mlp.down_proj"), torch.nn.Linear)


def test_full_training_leaves_every_weight_trainable(make_checkpoint: MakeCheckpoint, whole: Any) -> None:
    folder = make_checkpoint(tie_word_embeddings=True)
    checkpoint = BaseCheckpoint(folder)
    model = empty_model(checkpoint, FP32)
    load(checkpoint, model, {}, FP32, lambda: build_dense_model(model, FP32, whole))
    expected = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def drop(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


def replace(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({name: tensor})


def spoil(name: str, value: float) -> Callable[[dict[str, Tensor]], Any]:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[-1] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop(f"{UP}.weight"), rf"has no tensor '{UP}.weight', which the architecture in its config.json needs"),
        (drop(NORM), rf"has no tensor '{NORM}'"),
        (replace(f"{UP}.weight", torch.zeros(12, 18)), r"has shape \(12, 18\), expected \(18, 12\) from config.json"),
        (replace(NORM, torch.ones(13)), rf"tensor '{NORM}' of .* has shape \(13,\), expected \(12,\)"),
        (spoil(f"{UP}.weight", math.nan), rf"tensor '{UP}.weight' of .* holds NaN or Inf; the checkpoint is damaged"),
        (spoil(NORM, -math.inf), rf"tensor '{NORM}' of .* holds NaN or Inf"),
        (
            replace(f"{UP}.weight", torch.zeros(18, 12, dtype=torch.int8)),
            rf"tensor '{UP}.weight' of .* is torch.int8, expected a floating-point weight of 16 or 32 bits",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    make_checkpoint: MakeCheckpoint, whole: Any, edit: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    with pytest.raises(UserError, match=f"model.name_or_path: .*{message}"):
        build(make_checkpoint(edit), whole)


def test_a_missing_bias_of_a_target_is_refused(make_checkpoint: MakeCheckpoint, whole: Any) -> None:
    """config.json says that there is one: going on without it would be another model."""
    name = "model.layers.0.self_attn.q_proj.bias"
    with pytest.raises(UserError, match=f"has no tensor '{name}'"):
        build(make_checkpoint(drop(name), attention_bias=True), whole)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, "is a 'gpt2' model; expected one of llama, mistral"),
        ({"model_type": None}, "is a None model; expected one of llama, mistral"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "is quantized by 'gptq' .* expected a 16-bit checkpoint, or bitsandbytes NF4",
        ),
        (
            {
                "quantization_config": {
                    "quant_method": "bitsandbytes",
                    "load_in_4bit": True,
                    "bnb_4bit_quant_type": "fp4",
                }
            },
            r"is quantized by 'bitsandbytes' \(fp4\); expected a 16-bit checkpoint, or bitsandbytes NF4",
        ),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}},
            "is a 'own' model that needs code of its repository, and remote code is never executed; expected one of",
        ),
        ({"hidden_size": "large"}, r"transformers cannot make a model from .*config.json \("),
        ({"num_attention_heads": 0}, r"transformers cannot make a model from .*config.json \("),
    ],
)
def test_an_architecture_that_cannot_be_trained_is_refused(
    make_checkpoint: MakeCheckpoint, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=f"model.name_or_path: .*{message}"):
        empty_model(BaseCheckpoint(make_checkpoint(config=config)), FP32)


def test_a_density_without_a_weight_names_the_layer(make_checkpoint: MakeCheckpoint) -> None:
    model = empty_model(BaseCheckpoint(make_checkpoint()), FP32)
    with pytest.raises(UserError) as caught:
        plan_layouts(model, SparseSettings(["k_proj", "up_proj"], density=0.01, seed=0))
    assert str(caught.value) == (
        "method.density: 0.01 of the 72 weights of model.layers.0.self_attn.k_proj is less than one weight; expected a "
        "density of at least 0.014 for this layer."
    )


def test_a_block_that_does_not_divide_names_the_layer(make_checkpoint: MakeCheckpoint) -> None:
    model = empty_model(BaseCheckpoint(make_checkpoint()), FP32)
    with pytest.raises(UserError) as caught:
        plan_layouts(model, SparseSettings(["q_proj", "up_proj"], density=0.5, seed=0, block_size=(4, 3)))
    assert str(caught.value) == (
        "method.block_size: model.layers.0.mlp.up_proj has 18 rows and 12 columns, which blocks of 4 x 3 do not "
        "divide. Choose sides that divide them (2 and 4 do), or leave the matrix out of method.target_modules."
    )
    with pytest.raises(UserError, match=r"0\.02 of the 36 blocks of 6 x 1 of .*up_proj is less than one block;"):
        plan_layouts(model, SparseSettings(["up_proj"], density=0.02, seed=0, block_size=(6, 1)))


@pytest.mark.parametrize("bernoulli", [False, True])
def test_random_blocks(make_checkpoint: MakeCheckpoint, whole: Any, bernoulli: bool) -> None:
    sparse = SparseSettings("all-linear", density=0.3, seed=3, bernoulli=bernoulli, block_size=(3, 2))
    model = build(make_checkpoint(), whole, sparse=sparse)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    for name, layer in layers.items():
        num_blocks = layer.layout.num_elements // 6
        expected = random_subset(num_blocks, math.floor(Fraction("0.3") * num_blocks), seed=3, name=name)
        if bernoulli:
            expected = bernoulli_subset(num_blocks, 0.3, seed=3, name=name)
        assert torch.equal(layer.indices.long(), expected)
        assert layer.num_active == layer.values.numel() == 6 * expected.numel()


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_every_rank_owns_whole_blocks(make_checkpoint: MakeCheckpoint, num_ranks: int) -> None:
    model = empty_model(BaseCheckpoint(make_checkpoint()), FP32)
    sparse = SparseSettings("all-linear", density=0.3, seed=3, block_size=(2, 3), slots_per_active=1.5)
    alone, shared = plan_layouts(model, sparse), plan_layouts(model, sparse, num_ranks)
    for name, layout in shared.items():
        assert (layout.num_active, layout.num_slots) == (alone[name].num_active, alone[name].num_slots)
        assert layout.num_stored % (6 * num_ranks) == 0 and layout.num_stored - layout.num_slots < 6 * num_ranks
        assert layout.num_index_slots * 6 == layout.num_stored


def test_layouts_have_the_shapes_of_the_model(make_checkpoint: MakeCheckpoint) -> None:
    model = empty_model(BaseCheckpoint(make_checkpoint()), FP32)
    layouts = plan_layouts(model, SparseSettings(["k_proj", "down_proj"], density=0.25, seed=0))
    assert [(x.num_rows, x.num_cols, x.num_active) for x in layouts.values()] == [(6, 12, 18), (12, 18, 54)] * 2
    assert not any(buffer.is_meta for buffer in model.buffers()) and all(p.is_meta for p in model.parameters())
