"""SparseSM3: slices, padding, guards, state; its arithmetic is compared with an independent oracle in tests/parity."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from sparse_ds.optim import sm3
from sparse_ds.optim.flat_segment import FlatSegment
from sparse_ds.optim.sm3 import SparseSM3

NAN = float("nan")
SETTINGS = {"lr": 0.1, "weight_decay": 0.3, "momentum": 0.5, "eps": 1e-8}


@dataclass
class Target:
    """One tensor of the toy model: sparse entries of a matrix, or all of them (`indices=None`)."""

    name: str
    num_rows: int
    num_cols: int
    indices: Tensor | None
    values: Tensor
    gradients: list[Tensor]  # one per step


@dataclass
class Worker:
    """One rank with its flat tensors; `pieces` says which elements of which target each flat tensor holds."""

    optimizer: SparseSM3
    flats: list[Tensor] = field(default_factory=list)
    pieces: list[list[tuple[Target, int, int, int]]] = field(default_factory=list)


def toy_targets(num_steps: int = 4) -> list[Target]:
    generator = torch.Generator().manual_seed(0)
    targets = []
    for name, num_rows, num_cols, num_active in (
        ("a", 5, 7, 12),
        ("b", 4, 3, 6),
        ("head", 3, 4, 12),
        ("bias", 5, 1, 5),
    ):
        dense = name in ("head", "bias")
        drawn = torch.randperm(num_rows * num_cols, generator=generator)[:num_active]
        targets.append(
            Target(
                name,
                num_rows,
                num_cols,
                None if dense else drawn.sort().values.int(),
                torch.randn(num_active, generator=generator),
                [torch.randn(num_active, generator=generator) for _ in range(num_steps)],
            )
        )
    return targets


def build(targets: list[Target], cuts: list[list[tuple[int, int, int]]], padding: int) -> Worker:
    """Flat tensors from `cuts`, each a list of (target number, begin, end); NaN padding after every piece."""
    optimizer = SparseSM3([torch.nn.Parameter(torch.zeros(1))], **SETTINGS)
    worker = Worker(optimizer)
    for cut in cuts:
        parts: list[Tensor] = []
        segments, pieces, offset = [], [], 0
        for number, begin, end in cut:
            target = targets[number]
            indices = None if target.indices is None else target.indices[begin:end].clone()
            start = begin if target.indices is None else 0
            segments.append(
                FlatSegment(target.name, offset, end - begin, target.num_rows, target.num_cols, indices, start)
            )
            pieces.append((target, begin, end, offset))
            parts += [target.values[begin:end], torch.full((padding,), NAN)]
            offset += end - begin + padding
        flat = torch.nn.Parameter(torch.cat(parts))
        optimizer.register_flat(flat, segments)
        worker.flats.append(flat)
        worker.pieces.append(pieces)
    return worker


def step_sub_groups(worker: Worker, step: int, order: list[int] | None = None) -> None:
    """As ZeRO-3 does: one `step` call per flat tensor, which is then the only param of the group."""
    for i in order or range(len(worker.flats)):
        flat = worker.flats[i]
        flat.grad = torch.full_like(flat, NAN)
        for target, begin, end, offset in worker.pieces[i]:
            flat.grad[offset : offset + end - begin] = target.gradients[step][begin:end]
        worker.optimizer.param_groups[0]["params"] = [flat]
        worker.optimizer.step()
        worker.optimizer.param_groups[0]["params"] = []


def collect(workers: list[Worker], targets: list[Target]) -> dict[str, Tensor]:
    values = {target.name: torch.full_like(target.values, NAN) for target in targets}
    for worker in workers:
        for flat, pieces in zip(worker.flats, worker.pieces, strict=True):
            for target, begin, end, offset in pieces:
                values[target.name][begin:end] = flat.detach()[offset : offset + end - begin]
    return values


def train(
    cuts_by_rank: list[list[list[tuple[int, int, int]]]], padding: int = 0, order: list[int] | None = None
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]], list[Worker]]:
    targets = toy_targets()
    workers = [build(targets, cuts, padding) for cuts in cuts_by_rank]
    for step in range(4):
        for worker in workers:
            step_sub_groups(worker, step, order)
        merged = torch.stack([worker.optimizer.pending_accumulators for worker in workers]).amax(0)
        for worker in workers:
            worker.optimizer.pending_accumulators.copy_(merged)
            worker.optimizer.finish_step()
    accumulators = {
        target.name: (
            workers[0].optimizer.row_accumulator(target.name).clone(),
            workers[0].optimizer.col_accumulator(target.name).clone(),
        )
        for target in targets
    }
    return collect(workers, targets), accumulators, workers


WHOLE = [[[(0, 0, 12), (1, 0, 6), (2, 0, 12), (3, 0, 5)]]]
SPLITS = {
    "a flat tensor per target": [[[(0, 0, 12)], [(1, 0, 6)], [(2, 0, 12)], [(3, 0, 5)]]],
    "one target in two sub-groups": [[[(0, 0, 5), (1, 0, 2)], [(0, 5, 12), (1, 2, 6), (2, 0, 12), (3, 0, 5)]]],
    "two ranks": [
        [[(0, 0, 6), (1, 0, 3), (2, 0, 6), (3, 0, 3)]],
        [[(0, 6, 12), (1, 3, 6), (2, 6, 12), (3, 3, 5)]],
    ],
    "three ranks, one of which owns nothing of the bias": [
        [[(0, 0, 4), (1, 0, 2)], [(2, 0, 4), (3, 0, 3)]],
        [[(0, 4, 8), (1, 2, 4)], [(2, 4, 8), (3, 3, 5)]],
        [[(0, 8, 12), (1, 4, 6)], [(2, 8, 12), (3, 5, 5)]],
    ],
}


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("split", SPLITS)
def test_slices_sub_groups_and_ranks_change_no_bit(split: str, padding: int) -> None:
    values, accumulators, _ = train(WHOLE)
    split_values, split_accumulators, _ = train(SPLITS[split], padding)
    for name in values:
        assert torch.equal(values[name], split_values[name]), name
        assert torch.equal(accumulators[name][0], split_accumulators[name][0]), name
        assert torch.equal(accumulators[name][1], split_accumulators[name][1]), name
        assert bool(values[name].isfinite().all()), "a comparison of NaN with NaN would prove nothing"


def test_the_order_of_sub_groups_changes_no_bit() -> None:
    cuts = SPLITS["one target in two sub-groups"]
    values, _, _ = train(cuts)
    reversed_values, _, _ = train(cuts, order=[1, 0])
    assert all(torch.equal(values[name], reversed_values[name]) for name in values)


def test_chunks_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    values, _, _ = train(WHOLE)
    monkeypatch.setattr(sm3, "_CHUNK_ELEMENTS", 5)
    chunked, _, _ = train(WHOLE)
    assert all(torch.equal(values[name], chunked[name]) for name in values)


def plain_update(target: Target, step: int, row_acc: Tensor, col_acc: Tensor, exp_avg: Tensor) -> None:
    """One matrix by itself, in the order of the equations, each operation rounded; changes all tensors in place."""
    indices = torch.arange(target.values.numel()) if target.indices is None else target.indices.long()
    rows, cols, grad = indices // target.num_cols, indices % target.num_cols, target.gradients[step]
    nu = torch.minimum(row_acc[rows], col_acc[cols]) + grad.square()
    row_acc.scatter_reduce_(0, rows, nu, "amax")
    col_acc.scatter_reduce_(0, cols, nu, "amax")
    exp_avg.mul_(SETTINGS["momentum"]).add_(grad / (nu + SETTINGS["eps"]).sqrt() * (1 - SETTINGS["momentum"]))
    target.values.mul_(1 - SETTINGS["lr"] * SETTINGS["weight_decay"]).sub_(exp_avg * SETTINGS["lr"])


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
def test_all_matrices_at_once_equal_each_by_itself_bit_for_bit(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sm3, "_CHUNK_ELEMENTS", chunk)
    values, accumulators, _ = train(WHOLE, padding=2)
    for target in toy_targets():
        row_acc, col_acc = torch.zeros(target.num_rows), torch.zeros(target.num_cols)
        exp_avg = torch.zeros_like(target.values)
        for step in range(len(target.gradients)):
            plain_update(target, step, row_acc, col_acc, exp_avg)
        assert torch.equal(values[target.name], target.values)
        assert torch.equal(torch.cat(accumulators[target.name]), torch.cat([row_acc, col_acc]))


def test_padding_is_neither_read_nor_written() -> None:
    _, _, workers = train(SPLITS["two ranks"], padding=3)
    for worker in workers:
        assert bool(worker.optimizer.accumulators.isfinite().all())
        for flat, pieces in zip(worker.flats, worker.pieces, strict=True):
            real = torch.zeros(flat.numel(), dtype=torch.bool)
            for _, begin, end, offset in pieces:
                real[offset : offset + end - begin] = True
            assert bool(flat.detach()[~real].isnan().all()) and not bool(flat.detach()[real].isnan().any())
            assert bool((worker.optimizer.state[flat]["exp_avg"][~real] == 0).all())


def one_weight(**settings: float) -> tuple[Tensor, SparseSM3]:
    """Entries (0, 1) and (2, 2) of a 3 x 3 matrix, values 1 and 1."""
    values = torch.nn.Parameter(torch.ones(2))
    optimizer = SparseSM3([values], **{"lr": 0.5, **settings})
    optimizer.register_flat(values, [FlatSegment("w", 0, 2, 3, 3, torch.tensor([1, 8]))])
    return values, optimizer


def test_no_gradient_no_update_and_no_division_by_zero() -> None:
    values, optimizer = one_weight(eps=0.0)
    optimizer.step()
    values.grad = torch.tensor([0.0, 2.0])
    optimizer.step()
    assert values.tolist() == [1.0, 0.5]  # 0 / 0 = 0; 1 - 0.5 * 2 / sqrt(4)


def test_nan_gradients_are_not_hidden() -> None:
    values, optimizer = one_weight(eps=0.0)
    values.grad = torch.tensor([NAN, 2.0])
    optimizer.step()
    assert values.isnan().tolist() == [True, False]


def test_eps_is_inside_the_root() -> None:
    values, optimizer = one_weight(eps=5.0)
    values.grad = torch.tensor([2.0, 0.0])
    optimizer.step()
    assert values.tolist() == pytest.approx([1 - 0.5 * 2 / 3, 1.0])  # sqrt(2 * 2 + 5)


def test_weight_decay_acts_on_the_value_not_on_the_accumulators() -> None:
    values, optimizer = one_weight(weight_decay=0.2)
    values.grad = torch.zeros(2)
    optimizer.step()
    optimizer.finish_step()
    assert values.tolist() == pytest.approx([0.9, 0.9])
    assert optimizer.accumulators.tolist() == [0.0] * 6


def test_learning_rate_is_read_at_every_step() -> None:
    values, optimizer = one_weight(eps=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)
    for _ in range(3):
        values.grad = torch.tensor([3.0, 3.0])
        optimizer.step()
        optimizer.finish_step()
        scheduler.step()
    assert values.tolist() == [0.5, 0.5]


def test_accumulators_of_rows_that_lost_their_weights_stay() -> None:
    values, optimizer = one_weight()
    values.grad = torch.tensor([2.0, 3.0])
    optimizer.step()
    optimizer.finish_step()
    optimizer._segments[values][0].indices = torch.tensor([1, 2])
    values.grad = torch.tensor([0.0, 1.0])
    optimizer.step()
    optimizer.finish_step()
    # The grown entry (0, 2) starts from min(row 0, col 2) = min(4, 9); row 2 keeps 9 though it has no active weight.
    assert optimizer.row_accumulator("w").tolist() == [5.0, 0.0, 9.0]
    assert optimizer.col_accumulator("w").tolist() == [0.0, 4.0, 9.0]


def test_without_momentum_there_is_no_state_per_weight() -> None:
    values, optimizer = one_weight()
    values.grad = torch.ones(2)
    optimizer.step()
    assert not any(optimizer.state.values())


def test_bf16_gradients_are_accumulated_in_fp32() -> None:
    values = torch.nn.Parameter(torch.zeros(1))
    optimizer = SparseSM3([values], lr=0.0)
    optimizer.register_flat(values, [FlatSegment("w", 0, 1, 1, 1, torch.tensor([0]))])
    for _ in range(300):
        sm3.sm3_update_(
            values.detach(),
            torch.ones(1, dtype=torch.bfloat16),
            torch.tensor([0]),
            torch.tensor([1]),
            optimizer.accumulators,
            optimizer.pending_accumulators,
            None,
            lr=0.0,
            weight_decay=0.0,
            momentum=0.0,
            eps=0.0,
        )
        optimizer.finish_step()
    assert optimizer.accumulators.tolist() == [300.0, 300.0], "bf16 would stop at 256"


def test_forgetting_finish_step_is_an_error() -> None:
    values, optimizer = one_weight()
    values.grad = torch.ones(2)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"call finish_step\(\) first"):
        optimizer.state_dict()
    with pytest.raises(RuntimeError, match=r"twice in one step: call finish_step\(\)"):
        optimizer.step()


def test_an_unregistered_tensor_is_an_error() -> None:
    values = torch.nn.Parameter(torch.ones(2))
    optimizer = SparseSM3([values], lr=0.1)
    values.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="unregistered tensor of 2 elements"):
        optimizer.step()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr: got -1"),
        ({"lr": NAN}, "lr: got nan"),
        ({"momentum": 1.0}, "momentum: got 1"),
        ({"weight_decay": -0.1}, "weight_decay: got"),
        ({"eps": -1e-8}, "eps: got"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseSM3([torch.nn.Parameter(torch.ones(1))], **{"lr": 0.1, **settings})


def test_bad_registrations_are_refused() -> None:
    optimizer = SparseSM3([torch.nn.Parameter(torch.ones(1))], lr=0.1)

    def dense(name: str, offset: int, num_rows: int = 2) -> FlatSegment:
        return FlatSegment(name, offset, 2, num_rows, 2)

    flat = torch.zeros(4)
    with pytest.raises(AssertionError, match="'b' overlaps"):
        optimizer.register_flat(flat, [dense("a", 0), dense("b", 1)])
    with pytest.raises(AssertionError, match="'a' overlaps the one before it, or is out of order"):
        optimizer.register_flat(flat, [dense("b", 2), dense("a", 0)])
    with pytest.raises(AssertionError, match="'a': segments of different shapes"):
        optimizer.register_flat(flat, [dense("a", 0), dense("a", 2, num_rows=3)])
    with pytest.raises(AssertionError, match="expected contiguous fp32"):
        optimizer.register_flat(flat.bfloat16(), [])
    with pytest.raises(AssertionError, match="expected contiguous fp32"):
        optimizer.register_flat(torch.zeros(4, 2).T, [])
    optimizer.register_flat(flat, [dense("a", 0)])
    with pytest.raises(AssertionError, match="registered already"):
        optimizer.register_flat(flat, [dense("a", 0)])


def plain_run(num_steps: int, state: dict | None = None, values: Tensor | None = None) -> tuple[SparseSM3, Tensor]:
    """As an ordinary optimizer of a 2-D parameter, with momentum."""
    weight = torch.nn.Parameter(torch.ones(3, 4) if values is None else values.clone())
    optimizer = SparseSM3([weight], lr=0.1, momentum=0.9)
    optimizer.register_flat(weight, [FlatSegment("w", 0, 12, 3, 4)])
    if state is not None:
        optimizer.load_state_dict(state)
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = ((weight - torch.arange(12.0).view(3, 4)) ** 2).sum()
        loss.backward()
        optimizer.step(lambda: 0.0)
        optimizer.finish_step()
    return optimizer, weight.detach()


def test_saved_and_loaded_equals_uninterrupted() -> None:
    whole, whole_values = plain_run(5)
    half, half_values = plain_run(2)
    state = copy.deepcopy(half.state_dict())
    rest, rest_values = plain_run(3, state, half_values)
    assert torch.equal(whole_values, rest_values)
    assert torch.equal(whole.accumulators, rest.accumulators)
    assert not torch.equal(half.accumulators, rest.accumulators)


def test_state_of_another_optimizer_is_refused() -> None:
    optimizer, _ = plain_run(1)
    state = optimizer.state_dict()
    del state["accumulators"]
    with pytest.raises(RuntimeError, match="no `accumulators`"):
        optimizer.load_state_dict(state)


def test_closure_is_called_with_gradients_enabled() -> None:
    values, optimizer = one_weight()

    def closure() -> float:
        loss = (values * 3).sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 6.0
    assert values.tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.gpu
@pytest.mark.parametrize("on_cuda", ["indices", "flat", "both"])
def test_cuda_equals_cpu(on_cuda: str) -> None:
    """Also with a flat tensor on the CPU (offload) and indices on the GPU."""
    results = []
    for cuda in (False, True):
        generator = torch.Generator().manual_seed(0)
        flat_device = "cuda" if cuda and on_cuda != "indices" else "cpu"
        index_device = "cuda" if cuda and on_cuda != "flat" else "cpu"
        indices = torch.randperm(77, generator=generator)[:30].sort().values.to(index_device)
        values = torch.nn.Parameter(torch.randn(30, generator=generator).to(flat_device))
        optimizer = SparseSM3([values], **SETTINGS)
        optimizer.register_flat(values, [FlatSegment("w", 0, 30, 7, 11, indices)])
        for _ in range(3):
            values.grad = torch.randn(30, generator=generator).to(flat_device)
            optimizer.step()
            optimizer.finish_step()
        results.append((values.detach().cpu(), optimizer.accumulators.cpu()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=0.0)
