"""The loss in chunks against the loss of whole logits in fp64, and its memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sparse_ds.model import chunked_loss
from sparse_ds.model.chunked_loss import chunked_head_loss
from sparse_ds.model.pieces import eager_loss

NUM_TOKENS, HIDDEN_SIZE, VOCABULARY_SIZE = 53, 24, 97
DIVISOR = 41


def operands(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(NUM_TOKENS, HIDDEN_SIZE, generator=generator).to(dtype)
    weight_VD = torch.randn(VOCABULARY_SIZE, HIDDEN_SIZE, generator=generator).to(dtype)
    labels_T = torch.randint(0, VOCABULARY_SIZE, (NUM_TOKENS,), generator=generator)
    # Some single tokens, and more in a row than a chunk has.
    labels_T[[0, 11, 52]] = -100
    labels_T[20:40] = -100
    return hidden_TD, weight_VD, labels_T


def exact(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and both gradients in fp64, by the formula: the gradient of the logits is softmax - onehot."""
    hidden_TD, weight_VD = hidden_TD.double(), weight_VD.double()
    scores_TV = hidden_TD @ weight_VD.t()
    bend_TV = torch.ones_like(scores_TV)
    if softcap is not None:
        tanh_TV = torch.tanh(scores_TV / softcap)
        scores_TV, bend_TV = softcap * tanh_TV, 1 - tanh_TV**2
    trained_T = labels_T != -100
    onehot_TV = F.one_hot(labels_T.clamp(min=0), VOCABULARY_SIZE)
    shares_TV = scores_TV.softmax(1)
    loss = -((shares_TV * onehot_TV).sum(1).log() * trained_T).sum() / DIVISOR
    gradient_TV = (shares_TV - onehot_TV) * trained_T[:, None] * bend_TV / DIVISOR
    return loss, gradient_TV @ weight_VD, gradient_TV.t() @ hidden_TD


@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("tokens_in_chunk", [1, 7, 52, 53, 1000])
def test_loss_and_gradient_of_every_chunk_size(
    tokens_in_chunk: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32; with a gradient that comes from behind."""
    monkeypatch.setitem(chunked_loss.CHUNK_ELEMENTS, "cpu", tokens_in_chunk * VOCABULARY_SIZE)
    hidden_TD, weight_VD, labels_T = operands(torch.float32)
    expected, expected_TD, _ = exact(hidden_TD, weight_VD, labels_T, softcap)
    hidden_TD.requires_grad_()
    loss = chunked_head_loss(eager_loss)(hidden_TD, weight_VD, labels_T, torch.tensor(DIVISOR), softcap)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    (gradient_TD,) = torch.autograd.grad(3 * loss, hidden_TD)
    torch.testing.assert_close(gradient_TD.double(), 3 * expected_TD, rtol=1e-5, atol=1e-6)


def test_in_bfloat16_it_rounds_as_the_eager_loss_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of the gradient is that of the whole logits, against fp64."""
    monkeypatch.setitem(chunked_loss.CHUNK_ELEMENTS, "cpu", 16 * VOCABULARY_SIZE)
    hidden_TD, weight_VD, labels_T = operands(torch.bfloat16)
    hidden_TD.requires_grad_()
    errors = {}
    expected_TD = exact(hidden_TD.detach(), weight_VD, labels_T, None)[1]
    for name, loss in (
        ("chunked", chunked_head_loss(eager_loss)(hidden_TD, weight_VD, labels_T, DIVISOR, None)),
        ("eager", eager_loss(F.linear(hidden_TD, weight_VD), labels_T) / DIVISOR),
    ):
        (gradient_TD,) = torch.autograd.grad(loss, hidden_TD)
        errors[name] = float((gradient_TD.double() - expected_TD).norm() / expected_TD.norm())
    assert errors["chunked"] <= 1.05 * errors["eager"]
    assert errors["eager"] > 1e-4


def test_a_weight_that_trains_gets_its_gradient() -> None:
    hidden_TD, weight_VD, labels_T = operands(torch.float32)
    _, *expected = exact(hidden_TD, weight_VD, labels_T, None)
    for tensor in (hidden_TD, weight_VD):
        tensor.requires_grad_()
    loss = chunked_head_loss(eager_loss)(hidden_TD, weight_VD, labels_T, DIVISOR, None)
    for gradient, exact_gradient in zip(torch.autograd.grad(loss, [hidden_TD, weight_VD]), expected, strict=True):
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=1e-6)


def test_without_gradients_it_is_a_number() -> None:
    hidden_TD, weight_VD, labels_T = operands(torch.float32)
    expected = exact(hidden_TD, weight_VD, labels_T, None)[0]
    with torch.no_grad():
        loss = chunked_head_loss(eager_loss)(hidden_TD.requires_grad_(), weight_VD, labels_T, DIVISOR, None)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    assert not loss.requires_grad


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 12 bytes for each logit of a chunk, and the gradient of the hidden states."""
    tokens_in_chunk, num_tokens, vocabulary_size = 32, 512, 1000
    monkeypatch.setitem(chunked_loss.CHUNK_ELEMENTS, "cpu", tokens_in_chunk * vocabulary_size)
    hidden_TD = torch.randn(num_tokens, 8, dtype=torch.bfloat16).requires_grad_()
    weight_VD = torch.randn(vocabulary_size, 8, dtype=torch.bfloat16)
    labels_T = torch.randint(0, vocabulary_size, (num_tokens,))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        chunked_head_loss(eager_loss)(hidden_TD, weight_VD, labels_T, DIVISOR, None).backward()
    held = highest = 0
    events = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    one_chunk, all_logits = 12 * tokens_in_chunk * vocabulary_size, 2 * num_tokens * vocabulary_size
    assert highest < one_chunk + 3 * hidden_TD.nbytes + 20_000 < all_logits
