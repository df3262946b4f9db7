"""Packed rows against every sample alone: the same loss of every token, the same gradients.

The models are those of transformers, the reference is one forward pass per sample without any mask or position ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers.modeling_flash_attention_utils as flash_utils
from datasets import Dataset
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
)
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import flash_attention_mask

from sparse_ds.data import PackedCollator
from sparse_ds.data.packing import PackedDataset

VOCABULARY, ROW_LENGTH = 61, 24
# fp32: sums of some dozen terms of size 1 in another order. Another sample's token would change a loss by 0.01 or more.
TOLERANCE = 1e-5
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    # A window shorter than most samples.
    "mistral": MistralConfig(**SIZES, sliding_window=5),
    "gemma2": Gemma2Config(**SIZES, sliding_window=5, query_pre_attn_scalar=8, attn_logit_softcapping=3.0),
}
CASES = [("llama", "eager"), ("llama", "sdpa"), ("mistral", "eager"), ("mistral", "sdpa"), ("gemma2", "eager")]
LENGTHS = [2, 3, 24, 11, 5, 7, 9, 2, 16, 8, 13, 4]


def make_model(name: str, attention: str) -> Any:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention, dtype=torch.float32)
    model.config.use_cache = False
    return model.train()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small products: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def samples() -> Dataset:
    """Random tokens; the first third of each sample is a prompt that is not learned."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]
    labels = [[-100] * (len(one) // 3) + one[len(one) // 3 :] for one in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def losses_alone(model: Any, sample: dict[str, list[int]]) -> Tensor:
    """Negative log-likelihood of every trained token of one sample, by its own forward pass."""
    logits_TV = model(torch.tensor([sample["input_ids"]])).logits[0, :-1]
    labels_T = torch.tensor(sample["labels"])[1:]
    return F.cross_entropy(logits_TV, labels_T, reduction="none")[labels_T != -100]


def losses_packed(model: Any, batch: dict[str, Any]) -> Tensor:
    """The same of every trained token of a collated micro batch, row after row."""
    batch = {name: value for name, value in batch.items() if name != "sample_lengths"}
    labels_BT = batch.pop("labels")[:, 1:]
    logits_BTV = model(**batch).logits[:, :-1]
    losses_BT = F.cross_entropy(logits_BTV.transpose(1, 2), labels_BT, reduction="none")
    return losses_BT[labels_BT != -100]


Outcome = tuple[Tensor, list[Tensor]]
"""Losses of all trained tokens, in the order of the packed rows, and the gradients of their sum."""


def outcome(model: Any, losses: list[Tensor]) -> Outcome:
    total = torch.cat(losses)
    return total.detach(), list(torch.autograd.grad(total.sum(), list(model.parameters())))


def packed_and_alone(
    model: Any, samples: Dataset, collate: Callable[[Any], dict[str, Any]], reference: Any | None = None
) -> tuple[Outcome, Outcome]:
    """Of micro batches of three packed rows, and of every sample alone (by another model, if one is given)."""
    packed = PackedDataset(samples, ROW_LENGTH, range(len(samples)))
    assert len(packed) <= len(samples) / 2, "rows must hold several samples"
    rows = [packed[row] for row in range(len(packed))]
    batches = [collate(rows[start : start + 3]) for start in range(0, len(rows), 3)]
    alone, order = reference or model, packed.packing.samples.tolist()
    return (
        outcome(model, [losses_packed(model, batch) for batch in batches]),
        outcome(alone, [losses_alone(alone, samples[sample]) for sample in order]),
    )


def check_equal(packed: Outcome, alone: Outcome) -> None:
    assert packed[0].shape == alone[0].shape
    assert (packed[0] - alone[0]).abs().max() < TOLERANCE
    for left, right in zip(packed[1], alone[1], strict=True):
        assert (left - right).abs().max() < TOLERANCE * max(1.0, float(right.abs().max()))


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_every_token_has_the_loss_and_the_gradient_of_its_sample_alone(
    name: str, attention: str, samples: Dataset
) -> None:
    check_equal(*packed_and_alone(make_model(name, attention), samples, PackedCollator(pad_token_id=0)))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_no_bit_of_another_sample_arrives(attention: str, samples: Dataset) -> None:
    """Other tokens in the first sample of a row leave the logits of the others as they are, bit for bit."""
    model = make_model("llama", attention)
    packed = PackedDataset(samples.select([4, 5, 6]), ROW_LENGTH, range(3))
    (row,) = [packed[row] for row in range(len(packed))]
    changed = {**row, "input_ids": [[3 + (token + 7) % 50 for token in row["input_ids"][0]], *row["input_ids"][1:]]}
    logits = []
    for one in (row, changed):
        batch = PackedCollator(pad_token_id=0)([one])
        with torch.no_grad():
            logits.append(model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0])
    end = len(row["input_ids"][0])
    assert not torch.equal(logits[0][:end], logits[1][:end])
    assert torch.equal(logits[0][end:], logits[1][end:])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_these_tests_would_see_contamination(attention: str, samples: Dataset) -> None:
    """With a mask of ones beside the position ids, transformers takes a row for one sample."""
    collate = PackedCollator(pad_token_id=0)

    def with_mask(rows: Any) -> dict[str, Any]:
        batch = collate(rows)
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}

    packed, alone = packed_and_alone(make_model("llama", attention), samples, with_mask)
    assert (packed[0] - alone[0]).abs().max() > 0.1


def plain_varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **settings: Any
) -> Tensor:
    """What flash-attn's `flash_attn_varlen_func` computes: causal attention within each of the joined samples."""
    assert settings["causal"] and torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert int(settings["max_seqlen_q"]) == int(cu_seqlens_q.diff().max())
    bounds, outputs = cu_seqlens_q.tolist(), []
    for start, end in pairwise(bounds):
        heads = [tensor[start:end].transpose(0, 1) for tensor in (q, k, v)]
        attended = F.scaled_dot_product_attention(
            *heads, is_causal=True, enable_gqa=True, scale=settings.get("softmax_scale")
        )
        outputs.append(attended.transpose(0, 1))
    return torch.cat(outputs)


def test_flash_attention_is_told_the_bounds_of_the_samples(samples: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own path to flash attention, with the formula in place of the kernel, which needs a GPU."""

    def refuse(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("the rows would be taken for one sample each")

    def kernel_settings(**settings: Any) -> dict[str, Any]:
        names = {"max_seqlen_q": "max_seqlen_q", "max_seqlen_k": "max_seqlen_k", "softmax_scale": "softmax_scale"}
        return {"causal": settings["is_causal"]} | {new: settings[old] for old, new in names.items() if old in settings}

    functions = (refuse, plain_varlen_attention, refuse, refuse, refuse)
    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lambda name: (functions, (kernel_settings, refuse)))
    AttentionInterface.register("joined_by_formula", flash_attention_forward)
    AttentionMaskInterface.register("joined_by_formula", flash_attention_mask)
    model = make_model("llama", "joined_by_formula")
    collate = PackedCollator(pad_token_id=0, joins_rows=True)
    check_equal(*packed_and_alone(model, samples, collate, reference=make_model("llama", "eager")))
