"""Transposes are made once, shared between layers of one input only, and let go."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sparse_ds.kernels import product_operands
from sparse_ds.kernels.product_operands import InputUse, ProductOperands, use_input


class Projection(torch.autograd.Function):
    """Like a sparse layer: in backward it asks for the transpose of its input."""

    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, use: InputUse, seen: list[Tensor]) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(input)
        ctx.use, ctx.seen, ctx.weight = use, seen, weight
        return input @ weight

    @staticmethod
    def backward(ctx, grad_output: Tensor):  # type: ignore[no-untyped-def]
        (input,) = ctx.saved_tensors
        operands = ProductOperands(grad_output, input, ctx.use)
        assert torch.equal(operands.input_IT, input.t()) and operands.input_IT.is_contiguous()
        ctx.seen.append(operands.input_IT)
        operands.done()
        return grad_output @ ctx.weight.t(), None, None, None


@pytest.fixture
def num_copies(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    made: list[Tensor] = []

    def counted(matrix: Tensor) -> Tensor:
        made.append(matrix)
        return matrix.t().contiguous()

    monkeypatch.setattr(product_operands, "transposed", counted)
    return made


def project(input: Tensor, seen: list[Tensor]) -> Tensor:
    weight = torch.eye(input.shape[1])
    # A view of its own for each, as ZeRO-3's hooks hand the input to every module.
    own = input.view_as(input).detach().requires_grad_() if not input.requires_grad else input
    result: Tensor = Projection.apply(own, weight, use_input(own), seen)  # type: ignore[no-untyped-call]
    return result


def test_layers_of_one_input_share_its_transpose(num_copies: list[Tensor]) -> None:
    first, second = torch.randn(3, 4), torch.randn(3, 4)
    seen: list[Tensor] = []
    loss = sum(project(x, seen).sum() for x in (first, first, first, second, second))
    assert isinstance(loss, Tensor)
    loss.backward()
    assert len(seen) == 5 and len(num_copies) == 2
    assert len({each.data_ptr() for each in seen}) == 2


def test_an_input_that_was_changed_is_another_one(num_copies: list[Tensor]) -> None:
    input = torch.randn(3, 4)
    uses = [use_input(input)]
    input.add_(1)
    uses += [use_input(input), use_input(input[:, :3]), use_input(input.double()), use_input(input)]
    assert len({id(use.shared) for use in uses}) == 5
    assert use_input(input).shared is uses[-1].shared


def test_the_memory_of_an_input_that_is_gone_may_be_given_to_another() -> None:
    """Whatever address the next tensor gets, it is known to be another one."""
    for _ in range(50):
        old = use_input(torch.randn(100, 100))
        new = use_input(torch.randn(100, 100))
        assert old.shared is not new.shared


def test_the_last_backward_lets_the_transpose_go() -> None:
    input = torch.randn(3, 4)
    uses = [use_input(input) for _ in range(3)]
    gone = weakref.ref(uses[0].transposed(input))
    for use in uses:
        assert gone() is not None
        use.done()
    assert gone() is None


def test_layers_whose_graph_is_gone_are_not_waited_for() -> None:
    input = torch.randn(3, 4)
    uses = [use_input(input) for _ in range(3)]
    gone = weakref.ref(uses[0].transposed(input))
    del uses[1:]
    gc.collect()
    uses[0].done()
    assert gone() is None


def test_a_forward_after_the_backward_began_waits_for_itself() -> None:
    input = torch.randn(3, 4)
    uses = [use_input(input), use_input(input)]
    uses[0].transposed(input)
    late = use_input(input)
    assert late.shared is not uses[0].shared


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers_share_too(num_copies: list[Tensor], use_reentrant: bool) -> None:
    seen: list[Tensor] = []
    input = torch.randn(3, 4, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        normed = x * 2
        return project(normed, seen) + project(normed, seen) + project(normed, seen)

    for step in (1, 2):
        output = checkpoint(block, checkpoint(block, input, use_reentrant=use_reentrant), use_reentrant=use_reentrant)
        assert isinstance(output, Tensor)
        output.sum().backward()
        assert len(seen) == 6 * step and len(num_copies) == 2 * step
    assert input.grad is not None and torch.equal(input.grad, torch.full((3, 4), 72.0))


def test_without_gradients_nothing_is_remembered() -> None:
    input = torch.randn(3, 4)
    with torch.no_grad():
        assert use_input(input).shared is not use_input(input).shared
    with torch.inference_mode():
        inferred = torch.randn(3, 4)
    assert use_input(inferred).shared is not use_input(inferred).shared


def test_a_second_backward_of_one_graph(num_copies: list[Tensor]) -> None:
    seen: list[Tensor] = []
    input = torch.randn(3, 4)
    loss = project(input, seen).sum() + project(input, seen).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert len(seen) == 4
