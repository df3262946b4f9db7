"""One SFT-MA event against sets and sorts in plain Python, with and without a random share."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_ds.selection.apply_event import carry_over
from sparse_ds.selection.evidence import Evidence
from sparse_ds.selection.random_growth import random_inactive
from sparse_ds.selection.registry import find_growth, select
from sparse_ds.sparse.layout import SparseLayout

MAGNITUDES = st.sampled_from([0.0, 0.5, -0.5, 1.0, -2.0])
SCORES = st.sampled_from([0.0, 1.0, 2.0, 5.0])


@settings(max_examples=200)
@given(data=st.data(), num_rows=st.integers(1, 6), num_cols=st.integers(1, 6), share=st.sampled_from([0.0, 0.3, 1.0]))
def test_event_by_the_rules(data: st.DataObject, num_rows: int, num_cols: int, share: float) -> None:
    numel = num_rows * num_cols
    active = sorted(data.draw(st.sets(st.integers(0, numel - 1), min_size=1)))
    k = data.draw(st.integers(0, len(active)))
    values = data.draw(st.lists(MAGNITUDES, min_size=len(active), max_size=len(active)))
    row_acc = data.draw(st.lists(SCORES, min_size=num_rows, max_size=num_rows))
    col_acc = data.draw(st.lists(SCORES, min_size=num_cols, max_size=num_cols))
    evidence = Evidence(
        name="w",
        layout=SparseLayout(num_rows, num_cols, len(active)),
        indices=torch.tensor(active, dtype=torch.int32),
        drop_scores=torch.tensor(values).abs(),
        row_acc=torch.tensor(row_acc),
        col_acc=torch.tensor(col_acc),
        step=25,
        seed=7,
        random_growth_fraction=share,
    )

    result = select(find_growth("sft_ma"), evidence, k)

    inactive = [i for i in range(numel) if i not in active]
    by_score = sorted(inactive, key=lambda i: (-row_acc[i // num_cols] * col_acc[i % num_cols], i))
    num_grown = min(k, len(inactive))
    num_random = math.floor(Fraction(str(share)) * num_grown)
    best = by_score[: num_grown - num_random]
    occupied = torch.tensor(sorted({*active, *best}))
    drawn = random_inactive(numel, occupied, num_random, seed=7, name="w", step=25).tolist()
    by_magnitude = sorted(active, key=lambda i: (abs(values[active.index(i)]), i))
    dropped = by_magnitude[:num_grown]  # fewer grown, fewer dropped: the smallest ones
    staying = set(active) - set(dropped)
    assert result.indices.tolist() == sorted(staying | {*best, *drawn})
    assert result.num_replaced == num_grown
    assert carry_over(torch.tensor(values), result.source).tolist() == [
        values[active.index(i)] if i in staying else 0.0 for i in result.indices.tolist()
    ]


def test_full_density_replaces_nothing() -> None:
    evidence = Evidence(
        "w", SparseLayout(2, 3, 6), torch.arange(6), torch.zeros(6), row_acc=torch.ones(2), col_acc=torch.ones(3)
    )
    result = select(find_growth("sft_ma"), evidence, 6)
    assert result.indices.tolist() == list(range(6))
    assert result.source.tolist() == list(range(6))
    assert result.num_replaced == 0


def test_the_random_share_is_exact_for_the_decimal() -> None:
    """0.29 of 100 is 29; as a product of fp64 numbers it would be 28.999... and so 28."""
    active = torch.arange(300, 400)
    evidence = Evidence(
        "w",
        SparseLayout(1, 400, 100),
        active,
        torch.zeros(100),
        row_acc=torch.ones(1),
        col_acc=torch.arange(400.0, 0.0, -1.0),
        random_growth_fraction=0.29,
    )
    best = torch.arange(71)
    drawn = random_inactive(400, torch.cat([best, active]), 29, seed=0, name="w", step=0)
    result = select(find_growth("sft_ma"), evidence, 100)
    assert result.indices.tolist() == [*best.tolist(), *drawn.tolist()]
