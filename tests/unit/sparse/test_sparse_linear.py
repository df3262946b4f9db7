"""SparseLinear against a dense linear layer with autograd, without ZeRO (its parameters are whole)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

import sparse_ds.kernels.dense_row_blocks as dense_row_blocks
import sparse_ds.sparse.sparse_linear as sparse_linear_module
from sparse_ds.kernels.crossover import PathChoice
from sparse_ds.kernels.nf4 import quantize_nf4
from sparse_ds.kernels.product_operands import ProductOperands
from sparse_ds.sparse.layout import SparseLayout
from sparse_ds.sparse.sparse_linear import SparseLinear

ROWS, COLS, ACTIVE = 11, 14, 40
BASES = ["fp32", "bf16", "nf4", "nf4-double"]


def make_layer(
    base: str, num_active: int = ACTIVE, bias: bool = False, spare_slots: int = 0
) -> tuple[SparseLinear, Tensor]:
    """The layer, and its dense base weight as it is multiplied. Spare slots hold what must have no effect."""
    generator = torch.Generator().manual_seed(2)
    dtype = torch.float32 if base == "fp32" else torch.bfloat16
    weight_OI = (torch.randn(ROWS, COLS, generator=generator) / 4).to(dtype)
    indices = torch.randperm(ROWS * COLS, generator=generator)[:num_active].sort().values.int()
    values = torch.randn(num_active, generator=generator) / 4
    indices, values = F.pad(indices, (0, spare_slots)), F.pad(values, (0, spare_slots))
    tensors: dict[str, Parameter] = {
        "indices": Parameter(indices, requires_grad=False),
        "values": Parameter(values),
    }
    if bias:
        tensors["bias"] = Parameter(torch.randn(ROWS, generator=generator).to(dtype), requires_grad=False)
    if base.startswith("nf4"):
        quantized = quantize_nf4(weight_OI, double_quantization=base == "nf4-double")
        tensors["packed"] = Parameter(quantized.packed, requires_grad=False)
        tensors["absmax"] = Parameter(quantized.absmax, requires_grad=False)
        if quantized.nested_statistics is not None:
            tensors["nested_statistics"] = Parameter(quantized.nested_statistics, requires_grad=False)
    else:
        tensors["weight"] = Parameter(weight_OI, requires_grad=False)
    layer = SparseLinear(SparseLayout(ROWS, COLS, num_active, spare_slots), dtype, tensors)
    with torch.no_grad():
        kept = layer.values.data.clone()
        layer.values.data.zero_()
        with layer.merged_weight() as merged:
            weight_OI = merged.clone()
        layer.values.data.copy_(kept)
    return layer, weight_OI


def dense_forward(layer: SparseLinear, weight_OI: Tensor, values_K: Tensor, input: Tensor) -> Tensor:
    """The documented layer in plain autograd: W' = round(fp32 W + fp32 values), Y = X W'^T (+ b)."""
    deltas_N = torch.zeros(ROWS * COLS).index_put((layer.indices.long(),), values_K)
    merged_OI = (weight_OI.float() + deltas_N.view(ROWS, COLS)).to(weight_OI.dtype)
    assert layer.bias is None or isinstance(layer.bias, Parameter)
    return F.linear(input, merged_OI, layer.bias)


def base_bytes(layer: SparseLinear) -> list[Tensor]:
    frozen = [p.data for name, p in layer.named_parameters() if name != "values"]
    return [tensor.contiguous().view(torch.uint8).clone() for tensor in frozen]


def gradients(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).to(output.dtype)
    return torch.autograd.grad((output * weights).sum(), inputs)


@pytest.mark.parametrize("shape", [(COLS,), (1, COLS), (6, COLS), (2, 3, COLS)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("path", ["sampled", "dense"])
def test_equals_the_dense_oracle(path: str, base: str, bias: bool, shape: tuple[int, ...]) -> None:
    layer, weight_OI = make_layer(base, bias=bias)
    layer.path_choice = PathChoice(path)  # type: ignore[arg-type]
    before = base_bytes(layer)
    input = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(weight_OI.dtype).requires_grad_()
    oracle_input = input.detach().clone().requires_grad_()
    oracle_values = layer.values.detach().clone().requires_grad_()
    output = layer(input)
    expected = dense_forward(layer, weight_OI, oracle_values, oracle_input)
    assert torch.equal(output, expected), "the same product of the same rounded weight"
    grad_input, grad_values = gradients(output, input, layer.values)
    expected_input, expected_values = gradients(expected, oracle_input, oracle_values)
    assert grad_values.dtype == torch.float32 and grad_input.dtype == input.dtype
    # fp32: the order of the sums. bf16: the input gradient is the same product, the gradient of the values is one
    # rounding to 8 bits of fp32 sums on both sides.
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if base == "fp32" else {"rtol": 2**-7, "atol": 1e-2}
    torch.testing.assert_close(grad_input, expected_input, **tolerance)
    torch.testing.assert_close(grad_values, expected_values, **tolerance)
    assert all(torch.equal(x, y) for x, y in zip(before, base_bytes(layer), strict=True))


def test_gradients_are_the_derivatives() -> None:
    """Central differences of the fp32 layer. It is linear in input and values, so the step has no truncation error."""
    layer, _ = make_layer("fp32", num_active=5)
    input = torch.randn(3, COLS, generator=torch.Generator().manual_seed(4)).requires_grad_()
    direction = torch.randn(3, ROWS, generator=torch.Generator().manual_seed(5))
    grad_input, grad_values = torch.autograd.grad((layer(input) * direction).sum(), [input, layer.values])

    def objective() -> float:
        with torch.no_grad():
            return float((layer(input).double() * direction.double()).sum())

    for tensor, gradient in ((input, grad_input), (layer.values, grad_values)):
        for position in range(0, tensor.numel(), 3):
            kept = float(tensor.data.view(-1)[position])
            tensor.data.view(-1)[position] = kept + 0.5
            above = objective()
            tensor.data.view(-1)[position] = kept - 0.5
            below = objective()
            tensor.data.view(-1)[position] = kept
            assert above - below == pytest.approx(float(gradient.view(-1)[position]), abs=1e-4)


@pytest.mark.parametrize("num_active", [0, 1, ROWS * COLS])
@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_no_one_and_all_active(base: str, num_active: int) -> None:
    layer, weight_OI = make_layer(base, num_active=num_active)
    input = torch.randn(4, COLS).to(weight_OI.dtype).requires_grad_()
    output = layer(input)
    values = layer.values.detach().clone().requires_grad_()
    assert torch.equal(output, dense_forward(layer, weight_OI, values, input))
    (grad_values,) = gradients(output, layer.values)
    assert grad_values.shape == (num_active,)


@pytest.mark.parametrize("scratch_elements", [1, 30, 10**6])
def test_blocks_of_the_gradient_do_not_change_it(scratch_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = make_layer("fp32")
    input = torch.randn(6, COLS)
    (expected,) = gradients(layer(input), layer.values)
    monkeypatch.setattr(dense_row_blocks, "SCRATCH_ELEMENTS", scratch_elements)
    (blocked,) = gradients(layer(input), layer.values)
    torch.testing.assert_close(blocked, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("base", BASES)
def test_both_kinds_of_activation_checkpointing(base: str, use_reentrant: bool) -> None:
    layer, weight_OI = make_layer(base)
    before = base_bytes(layer)
    input = torch.randn(4, COLS).to(weight_OI.dtype).requires_grad_()
    expected = gradients(layer(input), input, layer.values)
    output = checkpoint(layer, input, use_reentrant=use_reentrant)
    # The reentrant kind forbids autograd.grad.
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).to(output.dtype))
    assert input.grad is not None and layer.values.grad is not None
    assert torch.equal(input.grad, expected[0]) and torch.equal(layer.values.grad, expected[1])
    assert all(torch.equal(x, y) for x, y in zip(before, base_bytes(layer), strict=True))


def test_input_that_needs_no_gradient_gets_none() -> None:
    layer, weight_OI = make_layer("bf16")
    input = torch.randn(4, COLS).to(weight_OI.dtype)
    (grad_values,) = gradients(layer(input), layer.values)
    assert grad_values.count_nonzero() > 0 and input.grad is None


@pytest.mark.parametrize("num_active", [0, 1, ACTIVE])
@pytest.mark.parametrize("base", BASES)
def test_spare_slots_have_no_effect_and_the_gradient_0(base: str, num_active: int) -> None:
    """The same layer with and without them, bit for bit, even if they held something."""
    layer, weight_OI = make_layer(base, num_active)
    roomy, _ = make_layer(base, num_active, spare_slots=7)
    assert roomy.layout.num_slots == roomy.values.numel() == num_active + 7 and roomy.num_active == num_active
    before = base_bytes(roomy)
    input = torch.randn(4, COLS, generator=torch.Generator().manual_seed(4)).to(weight_OI.dtype).requires_grad_()
    for left_over in (0.0, 3.0):
        with torch.no_grad():
            roomy.values[num_active:] = left_over
        output, expected = roomy(input), layer(input)
        assert torch.equal(output, expected)
        grad_input, grad_values = gradients(output, input, roomy.values)
        expected_input, expected_values = gradients(expected, input, layer.values)
        assert torch.equal(grad_input, expected_input)
        assert torch.equal(grad_values[:num_active], expected_values)
        assert grad_values.shape == (num_active + 7,) and not grad_values[num_active:].any()
    assert all(torch.equal(x, y) for x, y in zip(before, base_bytes(roomy), strict=True))
    assert torch.equal(roomy.active_indices, layer.indices)


@pytest.mark.parametrize("path", ["sampled", "dense"])
def test_the_number_of_active_weights_may_change(path: str) -> None:
    """As an event with redistribution does it: slots that were spare become active, or the other way around."""
    roomy, weight_OI = make_layer("fp32", num_active=10, spare_slots=5)
    roomy.path_choice = PathChoice(path)  # type: ignore[arg-type]
    input = torch.randn(4, COLS)
    for num_active in (15, 3, 0):
        indices = torch.randperm(ROWS * COLS)[:num_active].sort().values.int()
        values = torch.randn(num_active)
        roomy.num_active = num_active
        roomy.indices.data.zero_()[:num_active] = indices
        roomy.values.data.zero_()[:num_active] = values
        roomy.indices_changed()
        deltas_N = torch.zeros(ROWS * COLS).index_put((indices.long(),), values)
        output = roomy(input)
        assert torch.equal(output, F.linear(input, weight_OI + deltas_N.view(ROWS, COLS)))
        (grad_values,) = gradients(output, roomy.values)
        dense_OI = torch.randn(4, ROWS, generator=torch.Generator().manual_seed(9)).t() @ input
        torch.testing.assert_close(grad_values[:num_active], dense_OI.view(-1)[indices.long()], rtol=1e-5, atol=1e-5)
        assert grad_values.shape == (15,) and not grad_values[num_active:].any()
        assert grad_values[:num_active].count_nonzero() == num_active
        assert f"active={num_active}" in repr(roomy)


@pytest.mark.parametrize("use_reentrant", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("shape", [(COLS,), (6, COLS), (2, 3, COLS)])
@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_each_backward_shows_the_dense_gradient_once(
    base: str, shape: tuple[int, ...], use_reentrant: bool | None
) -> None:
    layer, weight_OI = make_layer(base)
    input = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(weight_OI.dtype).requires_grad_()
    weights = torch.randn(*shape[:-1], ROWS, generator=torch.Generator().manual_seed(9)).to(weight_OI.dtype)
    shown: list[ProductOperands] = []
    layer.observe_gradient = shown.append

    def forward() -> Tensor:
        output: Tensor = (
            layer(input) if use_reentrant is None else checkpoint(layer, input, use_reentrant=use_reentrant)
        )
        return output

    for num_backwards in (1, 2):
        layer.values.grad = None
        output = forward()
        assert len(shown) == num_backwards - 1, "a forward pass shows nothing"
        output.backward(weights)
        assert len(shown) == num_backwards
        grad_output_TO, input_TI = shown[-1].grad_output_TO, shown[-1].input_TI
        assert torch.equal(grad_output_TO, weights.reshape(-1, ROWS))
        assert torch.equal(input_TI, input.reshape(-1, COLS))
        assert not grad_output_TO.requires_grad
        dense_OI = grad_output_TO.float().t() @ input_TI.float()
        assert layer.values.grad is not None
        # The same sums of a few products; with a 16-bit input they are rounded to 8 bits at the end.
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if base == "fp32" else {"rtol": 2**-7, "atol": 1e-2}
        torch.testing.assert_close(layer.values.grad, dense_OI.view(-1)[layer.indices.long()], **tolerance)
        plain = layer.values.grad.clone()
    # Looking changes nothing, and after the phase nobody looks.
    layer.observe_gradient, layer.values.grad = None, None
    forward().backward(weights)
    assert len(shown) == 2 and torch.equal(layer.values.grad, plain)


def test_the_dense_gradient_is_shown_for_an_input_that_needs_no_gradient_too() -> None:
    """The first layer of a model."""
    layer, _ = make_layer("fp32")
    shown: list[ProductOperands] = []
    layer.observe_gradient = shown.append
    gradients(layer(torch.randn(4, COLS)), layer.values)
    assert len(shown) == 1
    with torch.no_grad():
        layer(torch.randn(4, COLS))
    assert len(shown) == 1


def test_what_observing_raises_comes_out_of_backward() -> None:
    layer, _ = make_layer("fp32")
    before = base_bytes(layer)

    def fail(operands: ProductOperands) -> None:
        raise RuntimeError("out of memory")

    layer.observe_gradient = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        layer(torch.randn(4, COLS)).sum().backward()
    assert all(torch.equal(x, y) for x, y in zip(before, base_bytes(layer), strict=True))


def test_saves_only_the_input() -> None:
    """A parameter saved for backward would keep the gathered tensor alive, or its old contents."""
    layer, weight_OI = make_layer("bf16")
    input = torch.randn(4, COLS).to(weight_OI.dtype).requires_grad_()
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(input)
    assert [tensor.data_ptr() for tensor in saved] == [input.data_ptr()]


def test_a_failing_product_leaves_the_base_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, weight_OI = make_layer("bf16")
    before = base_bytes(layer)

    def fail(*args: Any) -> Tensor:
        assert not torch.equal(args[1], weight_OI), "the deltas are not in"
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sparse_linear_module.F, "linear", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        layer(torch.randn(4, COLS).bfloat16())
    assert all(torch.equal(x, y) for x, y in zip(before, base_bytes(layer), strict=True))


@pytest.mark.parametrize("base", ["bf16", "nf4"])
def test_hidden_deltas_are_counted_when_asked(base: str) -> None:
    layer, weight_OI = make_layer(base)
    with torch.no_grad():
        layer.values[:10] = 0.0
        layer.values[10:25] = 1e-9
        layer(torch.randn(1, COLS).to(weight_OI.dtype))
        assert layer.hidden_deltas == (0, 0)
        layer.count_hidden = True
        layer(torch.randn(1, COLS).to(weight_OI.dtype))
    weights = weight_OI.view(-1)[layer.indices.long()].float()
    really_hidden = ((weights + layer.values).bfloat16().float() == weights) & (layer.values != 0)
    assert layer.hidden_deltas == (int(really_hidden.sum()), ACTIVE - 10)
    assert layer.hidden_deltas[0] >= 14


def test_description_names_the_base() -> None:
    assert repr(make_layer("nf4")[0]) == "SparseLinear(in=14, out=11, active=40, base=nf4)"
    assert repr(make_layer("bf16")[0]) == "SparseLinear(in=14, out=11, active=40, base=bfloat16)"


@pytest.mark.parametrize("path", ["sampled", "dense"])
@pytest.mark.parametrize("base", BASES)
def test_a_step_waits_for_no_device(base: str, path: str) -> None:
    """Once the row boundaries are known, nothing of forward and backward brings a number to the host."""
    layer, weight_OI = make_layer(base)
    layer.path_choice = PathChoice(path)  # type: ignore[arg-type]
    input = torch.randn(4, COLS).to(weight_OI.dtype).requires_grad_()
    gradients(layer(input), input, layer.values)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gradients(layer(input), input, layer.values)
    names = {event.name for event in profile.events() or ()}
    assert "aten::linear" in names
    assert not names & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"}
