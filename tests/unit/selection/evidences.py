"""Any evidence about one matrix, as a hypothesis strategy."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from sparse_ds.selection.evidence import Evidence
from sparse_ds.sparse.layout import SparseLayout

DROP_SCORES = st.one_of(st.sampled_from([0.0, 1.0, 1e-45]), st.floats(0, 2.0**100, width=32))
SCORES = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 2.0**100, width=32))


@st.composite
def evidences(draw: st.DrawFn, num_active_at_least: int = 0) -> Evidence:
    """A matrix with any active weights, candidates and scores, full of ties or without any."""
    num_rows, num_cols = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    positions = st.integers(0, num_rows * num_cols - 1)
    active = sorted(draw(st.sets(positions, min_size=num_active_at_least)))
    candidates = sorted(draw(st.sets(positions)))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))

    def scores(elements: st.SearchStrategy[float], count: int) -> Tensor:
        return torch.tensor(draw(st.lists(elements, min_size=count, max_size=count)), dtype=torch.float32)

    return Evidence(
        name="w",
        layout=SparseLayout(num_rows, num_cols, len(active)),
        indices=torch.tensor(active, dtype=dtype),
        drop_scores=scores(DROP_SCORES, len(active)),
        candidates=torch.tensor(candidates, dtype=dtype),
        candidate_scores=scores(SCORES, len(candidates)),
        row_acc=scores(SCORES, num_rows),
        col_acc=scores(SCORES, num_cols),
        step=draw(st.integers(1, 1000)),
        seed=draw(st.integers(0, 2**32)),
        random_growth_fraction=draw(st.sampled_from([0.0, 0.3, 1.0])),
    )
