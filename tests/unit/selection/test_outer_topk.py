"""Top-k of an outer product among inactive positions, against a dense brute force in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_ds.selection.outer_topk import outer_product_topk

# Few distinct numbers tie massively. In fp32 1e-30 squared underflows, 1e-45 is a denormal, 3e38 squared overflows.
TYING = st.sampled_from([0.0, 0.0, 1.0, 2.0, 3.0, 6.0, 1e-30, 1e-45, 3e38])
ANY = st.one_of(TYING, st.floats(0, 100, width=32))


def dense_topk(rows: Tensor, cols: Tensor, active: Tensor, k: int) -> list[int]:
    """Full matrix, stable sort."""
    scores = torch.outer(rows.double(), cols.double()).view(-1)
    scores[active.long()] = -1
    order = torch.argsort(scores, descending=True, stable=True)[: min(k, scores.numel() - active.numel())]
    return order.sort().values.tolist()


@settings(max_examples=400)
@given(
    data=st.data(),
    entries=st.sampled_from([TYING, ANY]),
    num_rows=st.integers(1, 9),
    num_cols=st.integers(1, 9),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_equals_dense_brute_force(
    data: st.DataObject, entries: st.SearchStrategy[float], num_rows: int, num_cols: int, dtype: torch.dtype
) -> None:
    numel = num_rows * num_cols
    rows = torch.tensor(data.draw(st.lists(entries, min_size=num_rows, max_size=num_rows)), dtype=torch.float32)
    cols = torch.tensor(data.draw(st.lists(entries, min_size=num_cols, max_size=num_cols)), dtype=torch.float32)
    active = torch.tensor(sorted(data.draw(st.sets(st.integers(0, numel - 1)))), dtype=dtype)
    k = data.draw(st.integers(0, numel + 3))
    grown = outer_product_topk(rows, cols, active, k)
    assert grown.dtype == torch.int64
    assert grown.tolist() == dense_topk(rows, cols, active, k)


@pytest.mark.parametrize("seed", range(6))
def test_equals_dense_brute_force_on_larger_matrices(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_rows, num_cols = 61, 83
    rows = torch.rand(num_rows, generator=generator) ** 8
    cols = torch.rand(num_cols, generator=generator) ** 8
    if seed % 2:  # untouched rows and columns
        rows *= torch.rand(num_rows, generator=generator) < 0.3
        cols *= torch.rand(num_cols, generator=generator) < 0.3
    if seed % 3 == 2:
        rows, cols = (rows * 4).round(), (cols * 4).round()
    for num_active in (0, 100, 2500, num_rows * num_cols):
        active = torch.randperm(num_rows * num_cols, generator=generator)[:num_active].sort().values
        for k in (1, 17, 400, 2000, num_rows * num_cols):
            assert outer_product_topk(rows, cols, active, k).tolist() == dense_topk(rows, cols, active, k)


def test_neighbouring_scores_are_told_apart() -> None:
    """Column scores one unit in the last place apart, thresholds that are not representable quotients."""
    one = torch.tensor(1.0)
    steps = [one]
    for _ in range(40):
        steps.append(torch.nextafter(steps[-1], torch.tensor(2.0)))
    cols = torch.stack(steps)
    rows = torch.stack(steps[::-1]) / 3
    active = torch.arange(0, 41 * 41, 7)
    for k in range(1, 41 * 41, 53):
        assert outer_product_topk(rows, cols, active, k).tolist() == dense_topk(rows, cols, active, k)


@given(seed=st.integers(0, 10_000), power=st.integers(-40, 40))
def test_scaling_by_a_power_of_two_changes_nothing(seed: int, power: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, cols = torch.rand(13, generator=generator), torch.rand(11, generator=generator)
    active = torch.randperm(143, generator=generator)[:20].sort().values
    once = outer_product_topk(rows, cols, active, 25)
    assert torch.equal(once, outer_product_topk(rows * 2.0**power, cols, active, 25))


def test_never_forms_the_matrix() -> None:
    """10^10 positions (80 GB in fp64), nearly all tied at score 0; indices beyond 2^31."""
    size = 100_000
    rows, cols = torch.zeros(size), torch.zeros(size)
    rows[[5, 90_000]] = torch.tensor([1.0, 2.0])
    cols[[7, 99_999]] = torch.tensor([3.0, 1.0])
    active = torch.tensor([0, 3, size + 1, 90_000 * size + 99_999])
    positive = [5 * size + 7, 5 * size + 99_999, 90_000 * size + 7]
    grown = outer_product_topk(rows, cols, active, 3).tolist()
    assert grown == positive
    # The rest in index order: row 0 without the active 0 and 3, then row 1 without the active column 1.
    grown = outer_product_topk(rows, cols, active, 3 + size).tolist()
    in_order = [c for c in range(size) if c not in (0, 3)] + [size, size + 2]
    assert grown == sorted(positive + in_order)


def test_scores_that_are_not_finite_are_refused() -> None:
    for bad in (float("inf"), float("nan")):
        with pytest.raises(RuntimeError, match="not finite"):
            outer_product_topk(torch.tensor([1.0, bad]), torch.ones(2), torch.tensor([0]), 1)


def test_scores_in_another_dtype_are_refused() -> None:
    with pytest.raises(AssertionError, match=r"torch\.float64"):
        outer_product_topk(torch.ones(2).double(), torch.ones(2), torch.tensor([0]), 1)


@pytest.mark.gpu
def test_cuda_equals_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, cols = torch.rand(61, generator=generator).round(decimals=1), torch.rand(83, generator=generator)
    active = torch.randperm(61 * 83, generator=generator)[:900].sort().values
    for k in (1, 700, 61 * 83):
        on_cuda = outer_product_topk(rows.cuda(), cols.cuda(), active.cuda(), k)
        assert on_cuda.tolist() == outer_product_topk(rows, cols, active, k).tolist()
