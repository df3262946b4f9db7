"""SparseSM3 against the paper's pseudo-code on full matrices, with drop-and-grow events by brute force in between."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sparse_ds.optim.flat_segment import FlatSegment
from sparse_ds.optim.sm3 import SparseSM3
from sparse_ds.selection.apply_event import carry_over
from sparse_ds.selection.evidence import Evidence
from sparse_ds.selection.random_subset import random_subset
from sparse_ds.selection.registry import find_growth, select
from sparse_ds.selection.schedule import num_to_replace
from sparse_ds.sparse.layout import SparseLayout

# fp32 against fp64: 24 bits, a few roundings a step, 40 steps.
RTOL = 2e-5


class DenseSM3:
    """Algorithm SM3-II (arXiv 1901.11150) word by word, in fp64: loops over the entries of a masked dense matrix.

    The cover sets are rows and columns. `restart` is the mu_t(r) = 0 at the start of a step; without it the old
    maximum takes part (the extension to active sets that change).
    """

    def __init__(self, shape: tuple[int, int], restart: bool, lr: float, decay: float, beta: float, eps: float) -> None:
        self.shape, self.restart = shape, restart
        self.lr, self.decay, self.beta, self.eps = lr, decay, beta, eps
        self.weight, self.momentum = np.zeros(shape), np.zeros(shape)
        self.row, self.col = np.zeros(shape[0]), np.zeros(shape[1])

    def step(self, mask: np.ndarray, grad: np.ndarray) -> None:
        new_row = np.zeros_like(self.row) if self.restart else self.row.copy()
        new_col = np.zeros_like(self.col) if self.restart else self.col.copy()
        for r in range(self.shape[0]):
            for c in range(self.shape[1]):
                if not mask[r, c]:
                    continue
                nu = min(self.row[r], self.col[c]) + grad[r, c] ** 2
                root = math.sqrt(nu + self.eps)
                update = grad[r, c] / root if root > 0 else 0.0
                self.momentum[r, c] = self.beta * self.momentum[r, c] + (1 - self.beta) * update
                self.weight[r, c] -= self.lr * self.momentum[r, c] + self.lr * self.decay * self.weight[r, c]
                new_row[r] = max(new_row[r], nu)
                new_col[c] = max(new_col[c], nu)
        self.row, self.col = new_row, new_col


def gradients(shape: tuple[int, int], step: int) -> np.ndarray:
    """Heavy-tailed, with whole rows and columns without gradient, representable in fp32."""
    generator = np.random.default_rng(step)
    grad = generator.standard_normal(shape) ** 3 * 10.0 ** generator.integers(-4, 2, size=(shape[0], 1))
    grad[generator.random(shape[0]) < 0.2] = 0
    grad[:, generator.random(shape[1]) < 0.2] = 0
    return grad.astype(np.float32)


@pytest.mark.parametrize(("momentum", "weight_decay", "eps"), [(0.0, 0.0, 0.0), (0.0, 0.3, 1e-8), (0.9, 0.1, 1e-8)])
def test_fixed_indices_equal_the_papers_algorithm(momentum: float, weight_decay: float, eps: float) -> None:
    shape = (9, 13)
    indices = random_subset(9 * 13, 40, seed=0, name="w")
    oracle = DenseSM3(shape, True, 0.01, weight_decay, momentum, eps)
    mask = np.zeros(9 * 13, dtype=bool)
    mask[indices.numpy()] = True
    values = torch.nn.Parameter(torch.zeros(40))
    optimizer = SparseSM3([values], lr=0.01, weight_decay=weight_decay, momentum=momentum, eps=eps)
    optimizer.register_flat(values, [FlatSegment("w", 0, 40, *shape, indices.int())])
    for step in range(40):
        grad = gradients(shape, step)
        oracle.step(mask.reshape(shape), grad)
        values.grad = torch.from_numpy(grad).view(-1)[indices]
        optimizer.step()
        optimizer.finish_step()
        np.testing.assert_allclose(optimizer.row_accumulator("w").numpy(), oracle.row, rtol=RTOL)
        np.testing.assert_allclose(optimizer.col_accumulator("w").numpy(), oracle.col, rtol=RTOL)
    np.testing.assert_allclose(values.detach().numpy(), oracle.weight.reshape(-1)[indices], rtol=RTOL, atol=1e-7)
    assert np.abs(oracle.weight).max() > 0.02, "the run must have moved"


def test_a_dense_vector_is_adagrad() -> None:
    bias = torch.nn.Parameter(torch.zeros(6))
    optimizer = SparseSM3([bias], lr=0.1, eps=0.0)
    optimizer.register_flat(bias, [FlatSegment("bias", 0, 6, 6, 1)])
    expected = torch.nn.Parameter(torch.zeros(6))
    adagrad = torch.optim.Adagrad([expected], lr=0.1, eps=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        bias.grad = torch.randn(6, generator=generator)
        expected.grad = bias.grad.clone()
        optimizer.step()
        optimizer.finish_step()
        adagrad.step()
    torch.testing.assert_close(bias, expected, rtol=1e-5, atol=1e-7)


def dense_event(oracle: DenseSM3, mask: np.ndarray, k: int) -> np.ndarray:
    """Drop-and-grow on full matrices: sort everything, ties by (score, index)."""
    num_cols = oracle.shape[1]
    active, inactive = np.flatnonzero(mask), np.flatnonzero(~mask)
    score = oracle.row[inactive // num_cols] * oracle.col[inactive % num_cols]
    grown = inactive[np.lexsort((inactive, -score))][:k]
    dropped = active[np.lexsort((active, np.abs(oracle.weight.reshape(-1)[active])))][: len(grown)]
    for state in (oracle.weight, oracle.momentum):
        state.reshape(-1)[dropped] = 0
    new_mask = mask.copy()
    new_mask[dropped], new_mask[grown] = False, True
    return new_mask


@pytest.mark.parametrize(("num_rows", "num_cols", "num_active"), [(9, 13, 30), (6, 5, 20)])
def test_drop_and_grow_training_equals_masks_on_full_matrices(num_rows: int, num_cols: int, num_active: int) -> None:
    """Events at steps 2, 7, 12, ..., the first of which replaces all (or as many as are inactive)."""
    shape, numel = (num_rows, num_cols), num_rows * num_cols
    sizes = {"total_steps": 30, "interval_steps": 5, "estimation_steps": 2, "initial_drop_fraction": 0.4}
    indices = random_subset(numel, num_active, seed=1, name="w").int()
    mask = np.zeros(numel, dtype=bool)
    mask[indices.numpy()] = True
    # Gradients of few significant bits: squares and their sums are exact in fp32, so ties are ties on both sides.
    generator = np.random.default_rng(0)
    oracle = DenseSM3(shape, False, 0.05, 0.1, 0.5, 1e-8)
    values = torch.nn.Parameter(torch.zeros(num_active))
    optimizer = SparseSM3([values], lr=0.05, weight_decay=0.1, momentum=0.5, eps=1e-8)
    segment = FlatSegment("w", 0, num_active, *shape, indices)
    optimizer.register_flat(values, [segment])
    num_events = 0
    for step in range(1, 31):
        grad = generator.integers(-6, 7, size=shape).astype(np.float32)
        grad[generator.random(num_rows) < 0.3] = 0
        oracle.step(mask.reshape(shape), grad)
        values.grad = torch.from_numpy(grad).view(-1)[segment.indices.long()]
        optimizer.step()
        optimizer.finish_step()
        k = num_to_replace(step, num_active=num_active, **sizes)
        if k:
            num_events += 1
            evidence = Evidence(
                name="w",
                layout=SparseLayout(segment.num_rows, segment.num_cols, num_active),
                indices=segment.indices,
                drop_scores=values.detach().abs(),
                row_acc=optimizer.row_accumulator("w"),
                col_acc=optimizer.col_accumulator("w"),
            )
            result = select(find_growth("sft_ma"), evidence, k)
            mask = dense_event(oracle, mask, k)
            values.data = carry_over(values.detach(), result.source)
            exp_avg = optimizer.state[values]["exp_avg"]
            exp_avg.copy_(carry_over(exp_avg, result.source))
            segment.indices = result.indices
        assert segment.indices.tolist() == np.flatnonzero(mask).tolist(), f"step {step}"
        dense_values = oracle.weight.reshape(-1)[segment.indices.numpy()]
        np.testing.assert_allclose(values.detach().numpy(), dense_values, rtol=RTOL, atol=1e-6)
    assert num_events >= 5
