"""SparseAdamW: equal to torch's AdamW, ages, padding, sub-groups, 16-bit and 8-bit moments, state."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from sparse_ds.kernels.compilation import CompiledUpdate
from sparse_ds.optim import adamw_update, moment_rounding, sparse_adamw
from sparse_ds.optim.adamw_update import age_bias_corrections
from sparse_ds.optim.sparse_adamw import Moments, SparseAdamW

NAN = float("nan")
ALL_MOMENTS: tuple[Moments, ...] = ("float32", "bfloat16", "int8")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are small: on a busy machine, threads only wait for each other here."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def make(values: Tensor, padding: list[tuple[int, int]] | None = None, **settings: object) -> SparseAdamW:
    """An optimizer with `values` registered as its one flat tensor."""
    optimizer = SparseAdamW([values], **{"lr": 0.01, **settings})
    optimizer.register_flat(values, padding or [])
    return optimizer


def run(
    moments: Moments, num_steps: int = 12, size: int = 700, padding: list[tuple[int, int]] | None = None
) -> tuple[Tensor, SparseAdamW]:
    """A run with noise for gradients, NaN in the padding."""
    generator = torch.Generator().manual_seed(0)
    values = torch.nn.Parameter(torch.randn(size, generator=generator))
    optimizer = make(values, padding, weight_decay=0.1, moments=moments)
    for _ in range(num_steps):
        values.grad = torch.randn(size, generator=generator)
        for begin, end in padding or []:
            values.grad[begin:end] = NAN
        optimizer.step()
    return values, optimizer


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95), (0.0, 0.5)])
def test_with_equal_ages_it_is_torch_adamw_bit_for_bit(betas: tuple[float, float]) -> None:
    """200 steps; with (0.8, 0.95) and (0, 0.5) beyond the end of the table of corrections, where one fp32 rounding
    of lr / (1 - beta1^age) may differ."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1000, generator=generator)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    settings = {"lr": 0.02, "betas": betas, "weight_decay": 0.1}
    optimizers = [make(ours, **settings), torch.optim.AdamW([theirs], foreach=False, **settings)]
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200) for optimizer in optimizers]
    for _ in range(200):
        ours.grad = torch.randn(1000, generator=generator) * 10 ** torch.empty(1000).uniform_(
            -4, 1, generator=generator
        )
        theirs.grad = ours.grad.clone()
        for optimizer in (*optimizers, *schedulers):
            optimizer.step()
    assert torch.equal(ours, theirs)
    assert float((ours - start).detach().abs().max()) > 0.1


def test_individual_ages_equal_an_fp64_oracle() -> None:
    """Each weight on its own, straight from the equations; weights are reborn in the middle."""
    lr, (beta1, beta2), eps, decay = 0.03, (0.9, 0.99), 1e-8, 0.1
    generator = torch.Generator().manual_seed(1)
    size, births = 40, {5: range(0, 10), 9: range(5, 20)}
    values = torch.nn.Parameter(torch.randn(size, generator=generator))
    optimizer = make(values, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    oracle = [(value, 0.0, 0.0, 0) for value in values.tolist()]
    for step in range(1, 31):
        values.grad = torch.randn(size, generator=generator)
        optimizer.step()
        for i, (w, m, v, age) in enumerate(oracle):
            g = float(values.grad[i])
            m, v, age = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g, age + 1
            w -= lr * decay * w
            w -= lr * (m / (1 - beta1**age)) / (math.sqrt(v / (1 - beta2**age)) + eps)
            oracle[i] = w, m, v, age
        for i in births.get(step, ()):
            # Grown with a mean gradient of 0.5, a mean square of 0.4 and 3 steps of estimation.
            oracle[i] = 0.0, (1 - beta1**3) * 0.5, (1 - beta2**3) * 0.4, 3
            states = optimizer.read_weight_states()
            for name, number in (("exp_avg", oracle[i][1]), ("exp_avg_sq", oracle[i][2]), ("birth_step", step - 3)):
                states[name][0][i] = number
            optimizer.write_weight_states(states)
            values.data[i] = 0.0
    expected = torch.tensor([w for w, *_ in oracle], dtype=torch.float64)
    torch.testing.assert_close(values.detach().double(), expected, rtol=1e-5, atol=1e-6)  # 30 fp32 steps of 0.03
    assert (30 - optimizer.read_weight_states()["birth_step"][0]).tolist() == [age for *_, age in oracle]


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.99), (0.95, 0.9999)])
@pytest.mark.parametrize("age", [1, 5, 50, 5000])
def test_the_first_step_of_a_seeded_weight_is_as_long_as_lr(age: int, betas: tuple[float, float]) -> None:
    """A constant gradient watched for `age` steps: m / sqrt(v) is its sign, whatever its size (eps put aside)."""
    gradient = torch.tensor([1e-4, 1e-2, 1.0, 10.0]).repeat(2) * torch.tensor([1.0, -1.0]).repeat_interleave(4)
    values = torch.nn.Parameter(torch.zeros(8))
    optimizer = make(values, lr=0.01, betas=betas, eps=1e-16)
    states = optimizer.read_weight_states()
    states["exp_avg"][0].copy_((1 - betas[0] ** age) * gradient.double())
    states["exp_avg_sq"][0].copy_((1 - betas[1] ** age) * gradient.double().square())
    states["birth_step"][0].fill_(-age)
    optimizer.write_weight_states(states)
    values.grad = gradient
    optimizer.step()
    torch.testing.assert_close(values.detach(), -0.01 * gradient.sign(), rtol=1e-6, atol=0.0)


def test_corrections_of_every_age_are_those_of_fp64() -> None:
    betas = (0.9, 0.999)
    table = age_bias_corrections(betas)
    cap = table.bias1.numel() - 1
    assert 17_000 < cap < 18_000
    assert float(table.bias1[1].float()) == float(torch.tensor(1 - 0.9))
    assert float(table.root_bias2[1]) == float(torch.tensor(math.sqrt(1 - 0.999)))
    assert float(table.bias1[cap].float()) == 1.0 and float(table.root_bias2[cap]) == 1.0
    values = torch.nn.Parameter(torch.zeros(1))
    optimizer = make(values, lr=0.01, eps=1e-16)
    optimizer.write_weight_states(
        {
            "exp_avg": [torch.ones(1)],
            "exp_avg_sq": [torch.ones(1)],
            "birth_step": [torch.tensor([-(2**30)], dtype=torch.int32)],
        }
    )
    values.grad = torch.ones(1)
    optimizer.step()
    assert values.tolist() == pytest.approx([-0.01], rel=1e-6), "an age beyond the table"


@pytest.mark.parametrize("moments", ALL_MOMENTS)
def test_a_new_weight_without_gradient_only_decays(moments: Moments) -> None:
    values = torch.nn.Parameter(torch.tensor([0.0, 2.0, 1.0]))
    optimizer = make(values, lr=0.5, weight_decay=0.1, moments=moments)
    for _ in range(3):
        values.grad = torch.tensor([0.0, 0.0, 1.0])
        optimizer.step()
    assert values.tolist()[:2] == pytest.approx([0.0, 2 * 0.95**3])
    assert values.tolist()[0] == 0.0


@pytest.mark.parametrize("moments", ALL_MOMENTS)
def test_padding_neither_matters_nor_changes(moments: Moments, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN gradients in the padding, across chunks and inside of blocks, against gradients of 0 there."""
    monkeypatch.setattr(sparse_adamw, "_CHUNK_ELEMENTS", 256)
    padding = [(690, 700), (3, 7), (250, 600), (9, 9)]
    in_padding = torch.zeros(700, dtype=torch.bool)
    for begin, end in padding:
        in_padding[begin:end] = True
    results = []
    for filling in (NAN, 0.0):
        generator = torch.Generator().manual_seed(0)
        values = torch.nn.Parameter(torch.randn(700, generator=generator).masked_fill(in_padding, 3.0))
        optimizer = make(values, padding, weight_decay=0.1, moments=moments)
        for _ in range(3):
            values.grad = torch.randn(700, generator=generator).masked_fill(in_padding, filling)
            optimizer.step()
            states = optimizer.read_weight_states()
            if moments != "float32":
                for name in ("exp_avg", "exp_avg_sq"):
                    states[name][0][in_padding] = filling  # gathered from uninitialised memory
            optimizer.write_weight_states(states)
        assert bool((values[in_padding] == 3.0).all())
        assert all(bool((tensors[0][in_padding] == 0).all()) for tensors in optimizer.read_weight_states().values())
        results.append(values.detach())
    assert torch.equal(*results) and bool(results[0].isfinite().all())


def test_nan_gradients_of_weights_are_not_hidden() -> None:
    for moments in ALL_MOMENTS:
        values = torch.nn.Parameter(torch.ones(2))
        optimizer = make(values, moments=moments)
        for gradient in (NAN, 1.0):
            values.grad = torch.tensor([gradient, 1.0])
            optimizer.step()
        assert bool(values[0].isnan())


@pytest.mark.parametrize("moments", ALL_MOMENTS)
def test_chunks_change_no_bit(moments: Moments, monkeypatch: pytest.MonkeyPatch) -> None:
    padding = [(100, 130), (500, 520)]
    whole, whole_optimizer = run(moments, padding=padding)
    monkeypatch.setattr(sparse_adamw, "_CHUNK_ELEMENTS", 256)
    chunked, chunked_optimizer = run(moments, padding=padding)
    assert torch.equal(whole, chunked)
    for name, tensors in whole_optimizer.read_weight_states().items():
        assert torch.equal(tensors[0], chunked_optimizer.read_weight_states()[name][0]), name


def test_sub_groups_as_deepspeed_steps_them() -> None:
    """Two flat tensors take turns as the only parameter of the group; also with different starts and a 2-D shape."""
    whole, _ = run("float32", num_steps=3, size=700)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(700, generator=generator)
    flats = [torch.nn.Parameter(start[:300].clone().view(30, 10)), torch.nn.Parameter(start[300:].clone())]
    optimizer = SparseAdamW([torch.nn.Parameter(torch.zeros(1))], 0.01, weight_decay=0.1)
    for flat in flats:
        optimizer.register_flat(flat)
    for _ in range(3):
        gradient = torch.randn(700, generator=generator)
        flats[0].grad, flats[1].grad = gradient[:300].view(30, 10), gradient[300:]
        for flat in flats:
            optimizer.param_groups[0]["params"] = [flat]
            optimizer.step()
            optimizer.param_groups[0]["params"] = []
    assert torch.equal(torch.cat([flat.detach().view(-1) for flat in flats]), whole)
    assert [optimizer.state[flat]["step"] for flat in flats] == [3, 3]
    states = optimizer.read_weight_states()
    assert all([tensor.shape for tensor in tensors] == [(30, 10), (400,)] for tensors in states.values())


def test_learning_rate_is_read_at_every_step() -> None:
    values = torch.nn.Parameter(torch.zeros(1))
    optimizer = make(values, lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)
    for _ in range(3):
        values.grad = torch.ones(1)
        optimizer.step()
        scheduler.step()
    assert values.tolist() == pytest.approx([-0.5])


@pytest.mark.parametrize("moments", ALL_MOMENTS)
def test_paused_changes_nothing(moments: Moments) -> None:
    values, optimizer = run(moments, num_steps=2)
    before, state = values.detach().clone(), copy.deepcopy(optimizer.state_dict())
    optimizer.paused = True
    values.grad = torch.ones(700)
    assert optimizer.step(lambda: 1.5) == 1.5
    assert torch.equal(values, before)
    assert_same_state(optimizer.state_dict(), state)
    optimizer.paused = False
    optimizer.step()
    assert not torch.equal(values, before) and optimizer.state[values]["step"] == 3


# Moments in 16 and 8 bits


def follow_squares(moments: Moments, before: float, after: float, num_steps: int) -> Tensor:
    """The second moment of weights that went from g^2 = before to g^2 = after, one weight of a block staying at 1."""
    values = torch.nn.Parameter(torch.zeros(256 * 32))
    optimizer = make(values, lr=1e-3, moments=moments)
    largest = torch.arange(values.numel()) % 256 == 0
    states = optimizer.read_weight_states()
    states["exp_avg_sq"][0].fill_(before).masked_fill_(largest, 1.0)
    optimizer.write_weight_states(states)
    for _ in range(num_steps):
        values.grad = torch.full_like(values, math.sqrt(after)).masked_fill_(largest, 1.0)
        optimizer.step()
    assert bool((optimizer.state[values]["step"] - optimizer.read_weight_states()["birth_step"][0] == num_steps).all())
    return optimizer.read_weight_states()["exp_avg_sq"][0][~largest]


@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
@pytest.mark.parametrize(("before", "after"), [(1.0, 0.25), (0.01, 0.5), (0.0, 1e-3)])
def test_the_second_moment_is_unbiased_and_never_freezes(moments: Moments, before: float, after: float) -> None:
    """Rounded to nearest it would stay at 1 and at 0.01. 8160 weights: the mean is good to (std 13 %) / 90."""
    exp_avg_sq = follow_squares(moments, before, after, num_steps=1100)
    expected = after + (before - after) * 0.999**1100
    assert float(exp_avg_sq.mean()) == pytest.approx(expected, rel=0.01)
    assert float(exp_avg_sq.std()) < 0.2 * expected


def test_rounded_to_nearest_it_freezes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason for stochastic rounding; if this fails, it is no longer needed."""
    monkeypatch.setattr(sparse_adamw, "random_bits", lambda *_: torch.tensor(-(1 << 31) + (1 << 15)))
    for moments in ("bfloat16", "int8"):
        assert bool((follow_squares(moments, 1.0, 0.25, num_steps=300) == 1.0).all())


@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_the_first_moment_forgets(moments: Moments) -> None:
    """After the gradient has become 0, m must not stay: the weight would drift for ever. Also at the most negative
    one of a block, which the map of bitsandbytes cannot hold."""
    values = torch.nn.Parameter(torch.zeros(512))
    optimizer = make(values, moments=moments)
    gradient = torch.linspace(-1, 0.9, 512)
    for _ in range(100):
        values.grad = gradient
        optimizer.step()
    exp_avg = optimizer.read_weight_states()["exp_avg"][0].clone()
    assert float(exp_avg[0]) == pytest.approx(-1.0, abs=0.02)
    torch.testing.assert_close(exp_avg, gradient, rtol=0.0, atol=0.1)
    assert abs(float((exp_avg - gradient).mean())) < 2e-3
    for _ in range(100):
        values.grad = torch.zeros(512)
        values.grad[::256] = 1.0
        optimizer.step()
    exp_avg = optimizer.read_weight_states()["exp_avg"][0]
    assert abs(float(exp_avg.view(2, 256)[:, 1:].mean())) < 1e-3
    assert float(exp_avg.view(2, 256)[:, 1:].abs().mean()) < 1e-3


def test_int8_never_divides_by_a_second_moment_that_was_rounded_away() -> None:
    values = torch.nn.Parameter(torch.zeros(256))
    optimizer = make(values, lr=0.01, moments="int8")
    gradient = torch.logspace(-12, 0, 256)
    for _ in range(20):
        values.grad = gradient
        optimizer.step()
    assert bool((optimizer.read_weight_states()["exp_avg_sq"][0] > 0).all())
    assert float(values.detach().abs().max()) < 20 * 0.01 * 1.5


def regression_loss(moments: Moments) -> float:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(512, 64, generator=generator) * torch.logspace(-1, 0.5, 64)
    target = inputs @ torch.randn(64, 8, generator=generator) + 0.1 * torch.randn(512, 8, generator=generator)
    values = torch.nn.Parameter(torch.zeros(512))
    optimizer = make(values, lr=0.02, moments=moments)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1200)
    for _ in range(1200):
        batch = torch.randint(512, (32,), generator=generator)
        values.grad = None
        (inputs[batch] @ values.view(64, 8) - target[batch]).square().mean().backward()
        optimizer.step()
        scheduler.step()
    return float((inputs @ values.detach().view(64, 8) - target).square().mean())


def test_a_regression_reaches_the_loss_of_fp32() -> None:
    """The noise floor is 0.01; the loss begins at 140."""
    reference = regression_loss("float32")
    assert reference < 0.02
    assert regression_loss("bfloat16") == pytest.approx(reference, rel=0.05)
    assert regression_loss("int8") == pytest.approx(reference, rel=0.2)


def test_rounding_to_bfloat16_keeps_what_is_not_finite() -> None:
    """The largest bits of a NaN would overflow to -0."""
    moment = torch.tensor([0x7FFFFFFF, 0x7F800000, -0x800000, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    rounded = moment_rounding.round_bfloat16(moment, 0xFFFF)
    assert rounded.isnan().tolist() == [True, False, False, True]
    assert rounded.tolist()[1:3] == [math.inf, -math.inf]


def test_random_bits_in_wrapping_int32_are_the_hash_in_python_integers() -> None:
    chunk = slice(1 << 20, (1 << 20) + 1000)
    bits = moment_rounding.random_bits(chunk, 7, 3, torch.device("cpu"))
    key = moment_rounding._lowbias32(moment_rounding._lowbias32(3) + 7)
    expected = [moment_rounding._lowbias32(position + key) for position in range(chunk.start, chunk.stop)]
    assert (bits.long() & 0xFFFFFFFF).tolist() == expected


def test_random_bits_are_uniform_and_new_at_every_step() -> None:
    """Mean of 16 uniform bits over positions, over steps, and the correlation of consecutive steps and tensors."""
    cpu = torch.device("cpu")
    fields = torch.stack([moment_rounding.random_bits(slice(0, 4096), step, 0, cpu) for step in range(1, 513)])
    other = moment_rounding.random_bits(slice(0, 4096), 1, 1, cpu)
    for shift in (0, 16):
        uniform = ((fields >> shift) & 0xFFFF).double() / 65536 - 0.5
        # 5 standard deviations (0.2887 / sqrt(n)) of the extreme of 4096 and of 512 means
        assert float(uniform.mean(0).abs().max()) < 5 * 0.2887 / math.sqrt(512)
        assert float(uniform.mean(1).abs().max()) < 5 * 0.2887 / math.sqrt(4096)
        assert abs(float((uniform[1:] * uniform[:-1]).mean() * 12)) < 5 / math.sqrt(511 * 4096)
        assert abs(float((uniform[0] * (((other >> shift) & 0xFFFF) / 65536 - 0.5)).mean() * 12)) < 5 / math.sqrt(4096)


# State


def assert_same_state(state: dict, expected: dict) -> None:
    assert state["state"].keys() == expected["state"].keys()
    for key, entries in expected["state"].items():
        for name, entry in entries.items():
            loaded = state["state"][key][name]
            if isinstance(entry, Tensor):
                assert loaded.dtype == entry.dtype and torch.equal(loaded, entry), name
            else:
                assert loaded == entry, name


@pytest.mark.parametrize("moments", ALL_MOMENTS)
def test_saved_and_loaded_equals_uninterrupted(moments: Moments) -> None:
    def go_on(values: Tensor, optimizer: SparseAdamW) -> Tensor:
        generator = torch.Generator().manual_seed(9)
        for _ in range(5):
            values.grad = torch.randn(700, generator=generator)
            optimizer.step()
        return values.detach()

    values, optimizer = run(moments)
    states = optimizer.read_weight_states()
    states["birth_step"][0][::3] = 4
    optimizer.write_weight_states(states)
    at_save, saved = values.detach().clone(), copy.deepcopy(optimizer.state_dict())
    states = {name: [tensors[0].clone()] for name, tensors in optimizer.read_weight_states().items()}
    uninterrupted = go_on(values, optimizer)

    loaded = torch.nn.Parameter(at_save.clone())
    resumed = make(loaded, weight_decay=0.1, moments=moments)
    resumed.load_state_dict(copy.deepcopy(saved))
    assert_same_state(resumed.state_dict(), saved)
    assert torch.equal(go_on(loaded, resumed), uninterrupted)

    # The way of our checkpoints: named fp32 and int32 tensors, and the step.
    loaded = torch.nn.Parameter(at_save.clone())
    resumed = make(loaded, weight_decay=0.1, moments=moments)
    resumed.write_weight_states(states)
    resumed.state[loaded]["step"] = saved["state"][0]["step"]
    assert_same_state(resumed.state_dict(), saved)
    assert torch.equal(go_on(loaded, resumed), uninterrupted)


@pytest.mark.parametrize("moments", ALL_MOMENTS)
def test_reading_and_writing_back_changes_no_bit(moments: Moments) -> None:
    values, optimizer = run(moments)
    before = copy.deepcopy(optimizer.state_dict())
    states = optimizer.read_weight_states()
    shared = [
        states[name][0].data_ptr() == optimizer.state[values][name].data_ptr() for name in ("exp_avg", "exp_avg_sq")
    ]
    assert shared == [moments == "float32"] * 2
    for _ in range(3):
        optimizer.write_weight_states(optimizer.read_weight_states())
    assert_same_state(optimizer.state_dict(), before)


@pytest.mark.parametrize(("moments", "bytes_per_weight"), [("float32", 8), ("bfloat16", 4), ("int8", 2.03125)])
def test_memory_is_what_the_docstring_says(moments: Moments, bytes_per_weight: float) -> None:
    values, optimizer = run(moments, num_steps=2, size=2560)

    def held_bytes() -> int:
        tensors = [entry for entry in optimizer.state[values].values() if isinstance(entry, Tensor)]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    assert held_bytes() == bytes_per_weight * 2560
    assert f"{bytes_per_weight}" in (SparseAdamW.__doc__ or "")
    for num_cohorts, more_bytes in ((256, 1), (257, 4), (1, 0)):
        states = optimizer.read_weight_states()
        states["birth_step"][0].copy_(torch.arange(2560) % num_cohorts)
        optimizer.write_weight_states(states)
        assert held_bytes() == (bytes_per_weight + more_bytes) * 2560


# Compiled


@pytest.mark.parametrize("num_cohorts", [1, 7, 300])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_compiled_step_equals_the_plain_one(
    num_cohorts: int, weight_decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both moments bit for bit. The rounding of the square root moves a step by about 1e-9, and so few values by one
    unit in the last place (2.4e-7 up to 4)."""
    results = []
    for smallest in (1 << 20, 1):
        monkeypatch.setattr(sparse_adamw, "_COMPILED_ELEMENTS", smallest)
        generator = torch.Generator().manual_seed(0)
        values = torch.nn.Parameter(torch.randn(5003, generator=generator))
        optimizer = make(values, [(100, 103), (5000, 5003)], weight_decay=weight_decay)
        states = optimizer.read_weight_states()
        states["birth_step"][0].copy_(-(torch.arange(5003) % num_cohorts))
        optimizer.write_weight_states(states)
        for lr in (0.01, 0.02, 0.003):
            optimizer.param_groups[0]["lr"] = lr
            values.grad = torch.randn(5003, generator=generator)
            values.grad[[101, 5001]] = NAN
            values.grad[7] = 0.0
            optimizer.step()
        results.append((values.detach(), optimizer.read_weight_states()))
    assert not adamw_update._compiled.failed
    (plain, plain_states), (compiled, compiled_states) = results
    for name in ("exp_avg", "exp_avg_sq", "birth_step"):
        assert torch.equal(plain_states[name][0], compiled_states[name][0]), name
    assert bool(compiled.isfinite().all())
    torch.testing.assert_close(compiled, plain, rtol=0.0, atol=2.4e-7)
    assert float((compiled != plain).float().mean()) < 0.05


def test_nan_gradients_are_not_hidden_by_the_compiled_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_adamw, "_COMPILED_ELEMENTS", 1)
    values = torch.nn.Parameter(torch.ones(40))
    optimizer = make(values)
    values.grad = torch.ones(40).index_fill_(0, torch.tensor([0, 17, 39]), NAN)
    optimizer.step()
    assert values.isnan().nonzero().view(-1).tolist() == [0, 17, 39]


def test_without_a_compiler_it_is_the_plain_step(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning, and not a bit is other than without compiling."""

    def no_compiler() -> Callable[..., None]:
        raise RuntimeError("no C++ compiler found\nmore lines")

    plain, _ = run("float32")
    monkeypatch.setattr(sparse_adamw, "_COMPILED_ELEMENTS", 1)
    monkeypatch.setattr(adamw_update, "_compiled", CompiledUpdate(no_compiler, "the AdamW step"))
    with caplog.at_level(logging.WARNING):
        values, _ = run("float32")
    assert torch.equal(values, plain)
    assert [record.getMessage() for record in caplog.records] == [
        "the AdamW step cannot be compiled and runs slower, in plain torch: no C++ compiler found"
    ]


def test_state_that_does_not_fit_is_refused() -> None:
    _, optimizer = run("float32", num_steps=1)
    _, other = run("int8", num_steps=1)
    with pytest.raises(RuntimeError, match="does not fit"):
        other.load_state_dict(optimizer.state_dict())
    unregistered = SparseAdamW([torch.nn.Parameter(torch.zeros(700))], 0.1)
    with pytest.raises(RuntimeError, match="register the flat tensors before loading"):
        unregistered.load_state_dict(optimizer.state_dict())


def test_an_unregistered_tensor_is_an_error() -> None:
    values = torch.nn.Parameter(torch.ones(2))
    optimizer = SparseAdamW([values], lr=0.1)
    values.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="unregistered tensor of 2 elements"):
        optimizer.step()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr: got -1"),
        ({"lr": NAN}, "lr: got nan"),
        ({"weight_decay": -0.1}, "weight_decay: got"),
        ({"eps": 0.0}, "eps: got 0"),
        ({"betas": (0.9, 1.0)}, "betas: got"),
        ({"betas": (-0.1, 0.9)}, "betas: got"),
        ({"betas": (0.9,)}, "betas: got"),
        ({"moments": "fp8"}, "moments: got 'fp8', expected one of float32, bfloat16, int8"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseAdamW([torch.nn.Parameter(torch.ones(1))], **{"lr": 0.1, **settings})


def test_bad_registrations_are_refused() -> None:
    flat = torch.zeros(4)
    optimizer = make(flat)
    registrations: list[tuple[str, Callable[[], None]]] = [
        ("registered already", lambda: optimizer.register_flat(flat)),
        ("expected contiguous fp32", lambda: optimizer.register_flat(flat.bfloat16())),
        ("expected contiguous fp32", lambda: optimizer.register_flat(torch.zeros(4, 2).T)),
        (r"padding \[2, 5\) is outside", lambda: optimizer.register_flat(torch.zeros(4), [(2, 5)])),
    ]
    for message, register in registrations:
        with pytest.raises(AssertionError, match=message):
            register()


@pytest.mark.parametrize("moments", ALL_MOMENTS)
def test_a_rank_that_owns_nothing(moments: Moments) -> None:
    values, optimizer = run(moments, size=0, num_steps=2)
    optimizer.write_weight_states(optimizer.read_weight_states())
    assert optimizer.state[values]["step"] == 2


@pytest.mark.gpu
@pytest.mark.parametrize("moments", ALL_MOMENTS)
def test_cuda_equals_cpu(moments: Moments) -> None:
    """One step, so that a code that is rounded the other way does not spread; moments and values after it."""
    results = []
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(0)
        values = torch.nn.Parameter(torch.randn(700, generator=generator).to(device))
        optimizer = make(values, [(10, 20)], weight_decay=0.1, moments=moments)
        values.grad = torch.randn(700, generator=generator).to(device)
        optimizer.step()
        results.append([values.detach().cpu()] + [t[0].cpu() for t in optimizer.read_weight_states().values()])
    for cpu, cuda in zip(*results, strict=True):
        differs = ~torch.isclose(cpu, cuda, rtol=1e-5, atol=1e-7)
        assert int(differs.sum()) <= (0 if moments == "float32" else 3)


def test_age_warmup_scales_the_step_of_each_weight() -> None:
    """Constant gradients: a step is lr * min(1, age / n) long, whatever the age that the weight begins with."""
    values = torch.nn.Parameter(torch.zeros(3))
    optimizer = SparseAdamW([values], lr=0.5, age_warmup_steps=8)
    optimizer.register_flat(values)
    gradient = torch.tensor([1.0, -2.0, 3.0])
    ages = torch.tensor([0, 5, 20])
    states = optimizer.read_weight_states()
    states["birth_step"][0].copy_(-ages)
    states["exp_avg"][0].copy_((1 - 0.9 ** ages.double()) * gradient)
    states["exp_avg_sq"][0].copy_((1 - 0.999 ** ages.double()) * gradient.square())
    optimizer.write_weight_states(states)
    for step in (1, 2, 3):
        before = values.detach().clone()
        values.grad = gradient.clone()
        optimizer.step()
        expected = -0.5 * torch.minimum((ages + step) / 8, torch.ones(3)) * gradient.sign()
        torch.testing.assert_close(values.detach() - before, expected, rtol=2e-6, atol=0.0)
