"""Biases and norms that train sparsely: which, how many entries, and nothing changed before training."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from checkpoint_doubles import MakeCheckpoint, load
from transformers import LlamaForCausalLM

from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.model.base_tensors import BaseSettings
from sparse_ds.model.build import (
    SparseSettings,
    build_sparse_model,
    empty_model,
    plan_layouts,
    plan_vector_layouts,
)
from sparse_ds.sparse.sparse_vector import SparseRMSNorm, SparseVector

FP32 = BaseSettings(dtype=torch.float32, nf4=False, double_quantization=False, attention="eager")
NORMS = ["input_layernorm", "post_attention_layernorm"]


@pytest.mark.parametrize("bernoulli", [False, True])
def test_biases_and_norms(make_checkpoint: MakeCheckpoint, whole: Any, bernoulli: bool) -> None:
    folder = make_checkpoint(attention_bias=True)
    checkpoint = BaseCheckpoint(folder)
    model = empty_model(checkpoint, FP32)
    sparse = SparseSettings(["q_proj", "up_proj"], 0.3, 3, bernoulli, train_biases=True, train_norms=True)
    layouts = plan_layouts(model, sparse)
    vectors = plan_vector_layouts(model, layouts, sparse)
    blocks = [f"model.layers.{block}" for block in range(2)]
    assert list(vectors) == [
        *(f"{block}.self_attn.q_proj.bias" for block in blocks),
        *(f"{block}.{norm}" for block in blocks for norm in NORMS),
        "model.norm",
    ]
    assert {(layout.num_rows, layout.num_cols) for layout in vectors.values()} == {(12, 1)}
    if not bernoulli:
        assert {layout.num_active for layout in vectors.values()} == {3}
    load(checkpoint, model, layouts, FP32, lambda: build_sparse_model(model, layouts, FP32, sparse, whole, vectors))
    made = {name: module for name, module in model.named_modules() if isinstance(module, SparseVector)}
    assert made.keys() == vectors.keys()
    assert all(isinstance(module, SparseRMSNorm) != name.endswith(".bias") for name, module in made.items())
    for name, module in made.items():
        assert module.indices.numel() == module.values.numel() == vectors[name].num_active >= 1
        assert module.values.requires_grad and not module.weight.requires_grad and not module.values.any()
    expected = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokens = torch.arange(14).view(2, 7)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected(tokens).logits)


def test_at_least_one_entry_of_each(make_checkpoint: MakeCheckpoint) -> None:
    model = empty_model(BaseCheckpoint(make_checkpoint()), FP32)
    for bernoulli in (False, True):
        sparse = SparseSettings(["up_proj"], 0.01, 0, bernoulli, train_norms=True)
        vectors = plan_vector_layouts(model, plan_layouts(model, sparse), sparse)
        assert len(vectors) == 5 and all(layout.num_active >= 1 for layout in vectors.values())


def test_no_biases_to_train(make_checkpoint: MakeCheckpoint, caplog: pytest.LogCaptureFixture) -> None:
    model = empty_model(BaseCheckpoint(make_checkpoint()), FP32)
    sparse = SparseSettings("all-linear", 0.1, 0, train_biases=True)
    with caplog.at_level(logging.WARNING, logger="sparse_ds"):
        assert plan_vector_layouts(model, plan_layouts(model, sparse), sparse) == {}
    assert "method.train_biases has no effect" in caplog.text
