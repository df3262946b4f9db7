"""One SFT-MA event against sets and sorts in plain Python."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_ds.selection.apply_event import carry_over
from sparse_ds.selection.sft_ma import select_sft_ma

MAGNITUDES = st.sampled_from([0.0, 0.5, -0.5, 1.0, -2.0])
SCORES = st.sampled_from([0.0, 1.0, 2.0, 5.0])


@settings(max_examples=200)
@given(data=st.data(), num_rows=st.integers(1, 6), num_cols=st.integers(1, 6))
def test_event_by_the_rules(data: st.DataObject, num_rows: int, num_cols: int) -> None:
    numel = num_rows * num_cols
    active = sorted(data.draw(st.sets(st.integers(0, numel - 1), min_size=1)))
    k = data.draw(st.integers(0, len(active)))
    values = data.draw(st.lists(MAGNITUDES, min_size=len(active), max_size=len(active)))
    row_acc = data.draw(st.lists(SCORES, min_size=num_rows, max_size=num_rows))
    col_acc = data.draw(st.lists(SCORES, min_size=num_cols, max_size=num_cols))

    result = select_sft_ma(
        torch.tensor(active, dtype=torch.int32),
        torch.tensor(values),
        torch.tensor(row_acc),
        torch.tensor(col_acc),
        k,
    )

    inactive = [i for i in range(numel) if i not in active]
    by_score = sorted(inactive, key=lambda i: (-row_acc[i // num_cols] * col_acc[i % num_cols], i))
    grown = by_score[:k]
    by_magnitude = sorted(active, key=lambda i: (abs(values[active.index(i)]), i))
    dropped = by_magnitude[: len(grown)]  # fewer grown, fewer dropped: the smallest ones
    staying = set(active) - set(dropped)
    assert result.indices.tolist() == sorted(staying | set(grown))
    assert result.num_replaced == len(grown)
    assert carry_over(torch.tensor(values), result.source).tolist() == [
        values[active.index(i)] if i in staying else 0.0 for i in result.indices.tolist()
    ]


def test_full_density_replaces_nothing() -> None:
    result = select_sft_ma(torch.arange(6), torch.zeros(6), torch.ones(2), torch.ones(3), 6)
    assert result.indices.tolist() == list(range(6))
    assert result.source.tolist() == list(range(6))
    assert result.num_replaced == 0
