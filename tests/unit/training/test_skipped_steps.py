"""Losses that are not finite, and the samples of a step; whole runs are in tests/faults."""

from __future__ import annotations

import pytest
import torch

from sparse_ds.training.global_order import GlobalOrderSampler
from sparse_ds.training.skipped_steps import samples_of_step, with_gradient_of_its_kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_finite_loss_and_its_gradient_stay_bit_for_bit(dtype: torch.dtype) -> None:
    x = torch.tensor(0.1, dtype=dtype, requires_grad=True)
    loss = with_gradient_of_its_kind(x * 3)
    loss.backward()
    assert loss.dtype == dtype and torch.equal(loss, x * 3)
    assert x.grad is not None and float(x.grad) == 3.0


def test_an_infinite_loss_with_a_finite_gradient() -> None:
    """Cross-entropy of a label whose logit is minus infinity."""
    logits = torch.tensor([[0.0, 1.0, -torch.inf]], requires_grad=True)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([2]))
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert torch.isinf(loss) and torch.isfinite(gradient).all()
    changed = with_gradient_of_its_kind(loss)
    changed.backward()
    assert not torch.isfinite(changed)
    assert logits.grad is not None and torch.isnan(logits.grad).all()


def test_the_samples_of_a_step_are_those_of_the_epoch() -> None:
    sampler = GlobalOrderSampler(10, 3, seed=5)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = list(sampler)
        for step_of_epoch in range(3):
            step = 3 * epoch + step_of_epoch + 1
            assert samples_of_step(sampler, 3, step) == order[3 * step_of_epoch : 3 * step_of_epoch + 3]
