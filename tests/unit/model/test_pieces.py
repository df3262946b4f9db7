"""Exchanged pieces against transformers' own modules: the same losses, the same gradients of everything that trains."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, PreTrainedModel

from sparse_ds.model.compiled_pieces import compiled_pieces
from sparse_ds.model.pieces import Pieces, eager_loss, eager_rms_norm, eager_rotary, install_pieces

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "use_cache": False,
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=5),
    "gemma2": Gemma2Config(**SIZES, sliding_window=5, query_pre_attn_scalar=8, final_logit_softcapping=3.0),
}
# fp32: sums of some dozen terms of size 1 in another order.
TOLERANCE = 2e-6
NUM_ITEMS = torch.tensor(37)
"""Trained tokens of the whole step: more than of this micro batch."""


@pytest.fixture(autouse=True)
def transformers_as_it_was() -> Iterator[None]:
    """The rotary embedding is exchanged for the whole process."""
    codes = [sys.modules[f"transformers.models.{name}.modeling_{name}"] for name in CONFIGS]
    before = [code.apply_rotary_pos_emb for code in codes]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for code, function in zip(codes, before, strict=True):
        code.apply_rotary_pos_emb = function


def make_model(name: str) -> PreTrainedModel:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager", dtype=torch.float32)
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name:
            torch.nn.init.uniform_(parameter, -0.5, 1.5)
    return model.train()


def make_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, SIZES["vocab_size"], (2, 9), generator=generator)
    labels = input_ids.clone()
    labels[0, :4] = -100
    labels[1, 6:] = -100
    mask = torch.ones_like(input_ids)
    mask[1, 6:] = 0
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def outcome(model: PreTrainedModel, **settings: Any) -> tuple[Tensor, list[Tensor]]:
    loss = model(**make_batch(), **settings).loss
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


def head_loss(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, divisor: Tensor | int, softcap: float | None
) -> Tensor:
    """In plain torch."""
    logits = hidden_TD @ weight_VD.t()
    return eager_loss(logits if softcap is None else softcap * torch.tanh(logits / softcap), labels_T) / divisor


EAGER = Pieces(
    eager_rms_norm,
    lambda name: {"silu": lambda gate, up: torch.nn.functional.silu(gate) * up}.get(name),
    eager_rotary,
    head_loss=head_loss,
)


@pytest.mark.parametrize("pieces", [EAGER, replace(EAGER, head_loss=None), Pieces(), Pieces(head_loss=head_loss)])
@pytest.mark.parametrize("name", CONFIGS)
def test_pieces_in_their_places(name: str, pieces: Pieces) -> None:
    """With plain functions as pieces nothing changes, with the divisor of a global batch and without."""
    expected, model = make_model(name), make_model(name)
    outcomes = [outcome(expected, num_items_in_batch=NUM_ITEMS), outcome(expected)]
    install_pieces(model, pieces)
    for (loss, gradients), settings in zip(outcomes, ({"num_items_in_batch": NUM_ITEMS}, {}), strict=True):
        torch.testing.assert_close(outcome(model, **settings), (loss, gradients), rtol=TOLERANCE, atol=TOLERANCE)
    assert not torch.allclose(outcomes[0][0], outcomes[1][0])


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_without_labels_there_are_logits(name: str) -> None:
    """In training too; and an answer can be generated."""
    expected, model = make_model(name), make_model(name)
    install_pieces(model, EAGER)
    batch = make_batch()
    labels = batch.pop("labels")
    torch.testing.assert_close(model(**batch).logits, expected(**batch).logits, rtol=TOLERANCE, atol=TOLERANCE)
    for each in (model, expected):
        each.eval()
    whole = model(**batch, labels=labels)
    assert whole.logits is not None
    torch.testing.assert_close(whole.loss, expected(**batch, labels=labels).loss, rtol=TOLERANCE, atol=TOLERANCE)
    prompt = {name: tensor[:1] for name, tensor in batch.items()}
    answers = [each.generate(**prompt, max_new_tokens=5, do_sample=False, use_cache=True) for each in (model, expected)]
    assert torch.equal(*answers)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_compiled_pieces_compute_the_same(name: str) -> None:
    """A whole model in fp32, with activation checkpointing. (A Llama on two ranks: tests/distributed.)"""
    expected, model = make_model(name), make_model(name)
    install_pieces(model, compiled_pieces(torch.device("cpu")))
    model.activation_checkpointing_enable({"use_reentrant": False})
    for num_items in (NUM_ITEMS, torch.tensor(50)):
        found = outcome(model, num_items_in_batch=num_items)
        torch.testing.assert_close(
            found, outcome(expected, num_items_in_batch=num_items), rtol=TOLERANCE, atol=TOLERANCE
        )


@pytest.mark.slow
def test_compiled_pieces_in_bfloat16_round_no_more_than_eager() -> None:
    """Against fp64, the error of each compiled piece is at most that of the eager one, or the last rounding."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 40, 32, dtype=torch.bfloat16), torch.rand(32, dtype=torch.bfloat16)
    pieces = compiled_pieces(torch.device("cpu"))
    hidden.requires_grad_()
    exact = eager_rms_norm_fp64(hidden, weight)
    error = {
        name: (function(hidden, weight, 1e-6, False).double() - exact).abs().mean()
        for name, function in (("eager", eager_rms_norm), ("compiled", pieces.rms_norm))
    }
    assert error["compiled"] <= 1.01 * error["eager"]


def eager_rms_norm_fp64(hidden: Tensor, weight: Tensor) -> Tensor:
    wide = hidden.detach().double()
    return weight.double() * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)


def test_no_compiler(tmp_path: Path) -> None:
    """In a process of its own: inductor keeps what it has found out about the compiler."""
    code = "import torch; from sparse_ds.model import compiled_pieces as it; it.compiled_pieces(torch.device('cpu'))"
    env = {**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 1
    assert "UserError: train.compile: got true, but torch cannot compile for cpu here" in ended.stderr
