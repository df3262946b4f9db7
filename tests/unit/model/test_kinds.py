"""Encoders and Gemma-2 from every kind of checkpoint: before training they are transformers' own models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_doubles import load
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaModel,
)

from sparse_ds.config.errors import UserError
from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.model.base_tensors import BaseSettings, check_base, list_base_tensors
from sparse_ds.model.build import SparseSettings, build_sparse_model, empty_model, plan_layouts, plan_vector_layouts
from sparse_ds.model.classification_head import Classification, initial_head, install_head
from sparse_ds.model.kinds import check_task, input_facts
from sparse_ds.model.tensor_names import names_in_model

SIZES: dict[str, Any] = {"vocab_size": 20, "hidden_size": 12, "intermediate_size": 18, "num_hidden_layers": 2}
ENCODER: dict[str, Any] = {**SIZES, "num_attention_heads": 2, "max_position_embeddings": 16}
BERT = BertConfig(**ENCODER, pad_token_id=0)
ROBERTA = RobertaConfig(**ENCODER, pad_token_id=1, type_vocab_size=1)
FP32 = BaseSettings(torch.float32, nf4=False, double_quantization=False, attention="auto")
LABELS = ("no", "yes", "maybe")


def save(model: PreTrainedModel, folder: Path) -> Path:
    """With vectors that are not 0 or 1."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    model.save_pretrained(folder)
    return folder


def with_old_names(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    renamed["bert.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


def build(folder: Path, whole: Any, sparse: SparseSettings, base: BaseSettings = FP32) -> PreTrainedModel:
    """The classifier of a run before its first step."""
    checkpoint = BaseCheckpoint(folder)
    classification = Classification(LABELS, checkpoint.config["pad_token_id"])
    model = empty_model(checkpoint, base, classification)
    layouts = plan_layouts(model, sparse)
    install_head(model, initial_head(checkpoint, classification, model, 5), torch.float32, whole)
    vectors = plan_vector_layouts(model, layouts, sparse)
    load(checkpoint, model, layouts, base, lambda: build_sparse_model(model, layouts, base, sparse, whole, vectors))
    return model.eval()


@pytest.mark.parametrize(
    ("make", "old_names"),
    [
        (lambda: BertForPreTraining(BERT), True),
        (lambda: BertForMaskedLM(BERT), False),
        (lambda: BertModel(BERT), False),
        (lambda: RobertaForMaskedLM(ROBERTA), False),
        (lambda: RobertaModel(ROBERTA), False),
    ],
    ids=["BERT with old names", "BERT without pooler", "BERT alone", "RoBERTa with its vocabulary", "RoBERTa alone"],
)
def test_an_encoder_is_transformers_classifier(
    tmp_path: Path, whole: Any, make: Callable[[], PreTrainedModel], old_names: bool
) -> None:
    torch.manual_seed(0)
    folder = save(make(), tmp_path / "base")
    if old_names:
        with_old_names(folder)
    model = build(folder, whole, SparseSettings("all-linear", 0.2, 3, train_biases=True, train_norms=True))
    is_bert = model.config.model_type == "bert"
    classifier = BertForSequenceClassification if is_bert else RobertaForSequenceClassification
    expected = classifier.from_pretrained(folder, num_labels=3, dtype=torch.float32).eval()
    own = dict(model.named_parameters())
    heads = ("bert.pooler.", "classifier.")
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            if name.startswith("classifier.") or (name.startswith(heads) and not _has_pooler(folder)):
                parameter.copy_(own[name])
    pad = model.config.pad_token_id
    tokens_BT = torch.tensor([[5, 6, 7, pad, pad], [4, 5, 6, 7, 8]])
    mask_BT = torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    types = {"token_type_ids": torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 1]])} if is_bert else {}
    with torch.no_grad():
        found, wanted = (m(tokens_BT, attention_mask=mask_BT, **types).logits for m in (model, expected))
    assert torch.allclose(found, wanted, rtol=0, atol=1e-6) and bool(wanted.abs().max() > 0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    dense = {name for name in trained if not name.endswith(".values")}
    linears = ("bert.pooler.dense", "classifier") if is_bert else ("classifier.dense", "classifier.out_proj")
    assert dense == {f"{linear}.{part}" for linear in linears for part in ("weight", "bias")}
    # Of both blocks: six linear layers with their biases, two norms.
    assert len(trained - dense) == 2 * (6 + 6 + 2)


def _has_pooler(folder: Path) -> bool:
    return any("pooler" in name for name in load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_gemma2_that_train(tmp_path: Path, whole: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, num_attention_heads=2, num_key_value_heads=1, head_dim=6, sliding_window=3)
    folder = save(Gemma2ForCausalLM(config), tmp_path / "base")
    checkpoint = BaseCheckpoint(folder)
    base = BaseSettings(dtype, nf4=False, double_quantization=False, attention="auto")
    model = empty_model(checkpoint, base)
    sparse = SparseSettings("all-linear", 0.2, 3, train_norms=True)
    layouts = plan_layouts(model, sparse)
    vectors = plan_vector_layouts(model, layouts, sparse)
    assert len(vectors) == 2 * 4 + 1
    load(checkpoint, model, layouts, base, lambda: build_sparse_model(model, layouts, base, sparse, whole, vectors))
    expected = Gemma2ForCausalLM.from_pretrained(folder, dtype=dtype)
    tokens = torch.arange(14).view(2, 7)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected(tokens).logits)


def test_attention_that_gemma2_does_not_have(tmp_path: Path) -> None:
    config = Gemma2Config(**SIZES, num_attention_heads=2, num_key_value_heads=1, head_dim=6)
    checkpoint = BaseCheckpoint(save(Gemma2ForCausalLM(config), tmp_path / "base"))
    assert empty_model(checkpoint, FP32).config._attn_implementation == "eager"
    with pytest.raises(UserError, match=r"model.attention: got sdpa, which gemma2 models cannot use"):
        empty_model(checkpoint, BaseSettings(torch.float32, False, False, "sdpa"))


def test_what_does_not_fit_an_encoder(tmp_path: Path) -> None:
    checkpoint = BaseCheckpoint(save(RobertaModel(ROBERTA), tmp_path / "base"))
    with pytest.raises(UserError, match=r"pads with token 2, its config.json says 1"):
        empty_model(checkpoint, FP32, Classification(LABELS, 2))
    model = empty_model(checkpoint, FP32, Classification(LABELS, 1))
    with pytest.raises(UserError, match=r"got label_words with a roberta model"):
        initial_head(checkpoint, Classification(LABELS, 1, (3, 4, 5)), model, 0)
    with pytest.raises(UserError, match=r"model.task: got causal_lm, .* is a 'roberta' model, an encoder"):
        empty_model(checkpoint, FP32)
    check_task(checkpoint.config, checkpoint.folder, "sequence_classification")


def test_a_pooler_of_another_shape(tmp_path: Path) -> None:
    folder = save(BertModel(BERT), tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors["pooler.dense.weight"] = torch.zeros(12, 11)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint, classification = BaseCheckpoint(folder), Classification(LABELS, 0)
    with pytest.raises(UserError, match=r"'bert.pooler.dense.weight' .* has shape \(12, 11\)"):
        initial_head(checkpoint, classification, empty_model(checkpoint, FP32, classification), 0)


def test_a_tensor_too_many_is_refused(tmp_path: Path, whole: Any) -> None:
    """A head that was trained for other labels is not silently left out."""
    torch.manual_seed(0)
    folder = save(BertForSequenceClassification(BertConfig(**ENCODER, num_labels=2)), tmp_path / "base")
    with pytest.raises(UserError, match=r"holds 2 tensor\(s\) .*classifier\.(weight|bias)"):
        build(folder, whole, SparseSettings("all-linear", 0.2, 3))
    checkpoint, classification = BaseCheckpoint(folder), Classification(LABELS, 0)
    model = empty_model(checkpoint, FP32, classification)
    install_head(model, initial_head(checkpoint, classification, model, 5), torch.float32, whole)
    check_base(checkpoint, list_base_tensors(model, [], FP32), model, unused=["classifier.*"])


def test_names() -> None:
    assert names_in_model(["layers.0.x", "norm.weight"], "llama") == {
        "model.layers.0.x": "layers.0.x",
        "model.norm.weight": "norm.weight",
    }
    assert names_in_model(["model.norm.weight", "lm_head.weight"], "llama") == {
        name: name for name in ("model.norm.weight", "lm_head.weight")
    }
    twice = names_in_model(["bert.a.LayerNorm.weight", "bert.a.LayerNorm.gamma"], "bert")
    assert set(twice) == {"bert.a.LayerNorm.weight", "bert.a.LayerNorm.gamma"}
    assert names_in_model(["x"], "unknown") == {"x": "x"}


def test_a_decoder_saved_without_its_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_attention_heads=2, tie_word_embeddings=True)
    checkpoint = BaseCheckpoint(save(LlamaModel(config), tmp_path / "base"))
    model = empty_model(checkpoint, FP32)
    assert check_base(checkpoint, list_base_tensors(model, [], FP32), model) == {}


def test_facts_for_the_data() -> None:
    assert input_facts(BERT) == {"is_encoder": True, "has_token_types": True, "max_tokens": 16}
    assert input_facts(ROBERTA) == {"is_encoder": True, "has_token_types": False, "max_tokens": 14}
    assert not input_facts(LlamaConfig(**SIZES, num_attention_heads=2))["is_encoder"]
