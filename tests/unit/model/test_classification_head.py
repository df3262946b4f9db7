"""The head before training, and the classifier around it: equal to transformers' own, with either kind of padding."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_doubles import MakeCheckpoint, load
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from sparse_ds.config.errors import UserError
from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.model.base_tensors import BaseSettings
from sparse_ds.model.build import SparseSettings, build_sparse_model, empty_model, plan_layouts
from sparse_ds.model.classification_head import (
    NORMAL_SCALE,
    Classification,
    find_label_word_ids,
    initial_head,
    install_head,
    normal_numbers,
)

LABELS = ("no", "yes", "maybe")
PAD = 2
FIRST_ROW = [0.024070363491773605, 0.0353311188519001, -0.03168181702494621, 0.027073798701167107]
"""Of seed 0 and hidden size 4."""


def build(folder: Path, whole: Any, dtype: torch.dtype) -> tuple[PreTrainedModel, Tensor]:
    checkpoint = BaseCheckpoint(folder)
    base = BaseSettings(dtype=dtype, nf4=False, double_quantization=False, attention="eager")
    classification = Classification(LABELS, PAD)
    model = empty_model(checkpoint, base, classification)
    sparse = SparseSettings("all-linear", density=0.1, seed=3)
    layouts = plan_layouts(model, sparse)
    head = initial_head(checkpoint, classification, model, seed=3)
    install_head(model, head, torch.float32, whole)
    load(checkpoint, model, layouts, base, lambda: build_sparse_model(model, layouts, base, sparse, whole))
    return model, head["score.weight"]


def head_of(checkpoint: BaseCheckpoint, classification: Classification) -> Tensor:
    base = BaseSettings(torch.float32, nf4=False, double_quantization=False, attention="eager")
    return initial_head(checkpoint, classification, empty_model(checkpoint, base, classification), 0)["score.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_training_it_is_transformers_classifier(
    make_checkpoint: MakeCheckpoint, whole: Any, dtype: torch.dtype
) -> None:
    folder = make_checkpoint()
    model, head_LD = build(folder, whole, dtype)
    config = LlamaConfig.from_pretrained(folder, num_labels=len(LABELS), pad_token_id=PAD)
    expected = LlamaForSequenceClassification.from_pretrained(
        folder, config=config, dtype=dtype, attn_implementation="eager"
    )
    expected.score.weight.data = head_LD.to(dtype)
    tokens_BT = torch.tensor([[5, 2, 7, 2, 2, 2], [4, 5, 6, 7, 8, 9]])
    batch = {"input_ids": tokens_BT, "attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6])}
    with torch.no_grad():
        logits, expected_logits = model(**batch).logits, expected(**batch).logits
        alone = model(input_ids=tokens_BT[:1, :3]).logits
    assert logits.dtype == torch.float32 and logits.shape == (2, 3)
    tolerance = {"rtol": 0, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-3}
    assert torch.allclose(logits, expected_logits.float(), **tolerance)
    assert torch.allclose(alone, logits[:1], **tolerance), "the last real token is read, and padding changes nothing"
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if not name.endswith(".values")} == {"score.weight"}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters() if parameter.requires_grad)
    assert not any(name.startswith("lm_head") for name, _ in model.named_parameters())


def test_normal_numbers() -> None:
    scale = NORMAL_SCALE / math.sqrt(400)
    head = normal_numbers((50, 400), scale, 3, "score.weight")
    assert head.dtype == torch.float32 and head.shape == (50, 400)
    scaled = head.double() / scale
    # 20,000 numbers: five standard errors of mean, variance and fourth moment.
    assert abs(float(scaled.mean())) < 5 / math.sqrt(20_000)
    assert abs(float(scaled.var()) - 1) < 5 * math.sqrt(2 / 20_000)
    assert abs(float((scaled**4).mean()) - 3) < 5 * math.sqrt(96 / 20_000)
    assert torch.equal(head, normal_numbers((50, 400), scale, 3, "score.weight"))
    assert not torch.equal(head, normal_numbers((50, 400), scale, 4, "score.weight"))
    assert not torch.equal(head, normal_numbers((50, 400), scale, 3, "classifier.weight"))


def test_normal_numbers_are_the_same_on_every_machine() -> None:
    head = normal_numbers((3, 4), NORMAL_SCALE / math.sqrt(4), 0, "score.weight")
    assert head[0].tolist() == pytest.approx(FIRST_ROW, rel=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_label_words(make_checkpoint: MakeCheckpoint, tied: bool) -> None:
    checkpoint = BaseCheckpoint(make_checkpoint(tie_word_embeddings=tied))
    head = head_of(checkpoint, Classification(LABELS, PAD, (7, 3, 11)))
    source = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert torch.equal(head, checkpoint.read(source)[[7, 3, 11]].float())
    with pytest.raises(UserError, match=f"tensor '{source}' has shape .* expected rows of 12 for every token up to 20"):
        head_of(checkpoint, Classification(LABELS, PAD, (7, 3, 20)))


def test_first_tokens_of_label_words() -> None:
    words = Tokenizer(WordLevel({"<unk>": 0, "very": 1, "good": 2, "bad": 3}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    assert find_label_word_ids(tokenizer, ["bad day", "very good"], ["0", "1"]) == (3, 1)
    with pytest.raises(UserError, match="got 2 words for 3 labels"):
        find_label_word_ids(tokenizer, ["bad", "good"], LABELS)
    with pytest.raises(UserError, match="'very good' and 'very bad' begin with the same token"):
        find_label_word_ids(tokenizer, ["very good", "very bad"], ["1", "0"])
    with pytest.raises(UserError, match="makes no token of ' '"):
        find_label_word_ids(tokenizer, [" ", "bad"], ["1", "0"])


def test_an_impossible_pad_token_is_refused(make_checkpoint: MakeCheckpoint) -> None:
    """A tokenizer with more tokens than the model has."""
    folder = make_checkpoint()
    base = BaseSettings(torch.float32, nf4=False, double_quantization=False, attention="eager")
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 20
    with pytest.raises(UserError, match="transformers cannot make a model"):
        empty_model(BaseCheckpoint(folder), base, Classification(LABELS, 20))
