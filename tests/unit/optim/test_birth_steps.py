"""BirthSteps: what is written is read, in as few bytes as the number of different steps allows."""

from __future__ import annotations

import pytest
import torch

from sparse_ds.optim import birth_steps
from sparse_ds.optim.birth_steps import BirthSteps


@pytest.mark.parametrize(
    ("steps", "dtype"),
    [
        ([0], None),
        ([-5], None),
        ([3, 100], torch.uint8),
        (range(256), torch.uint8),
        (range(-100, 157), torch.int32),
        ([-(2**31), 0, 2**31 - 1], torch.uint8),
    ],
)
def test_what_is_written_is_read(steps: list[int], dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(birth_steps, "_CHUNK_ELEMENTS", 64)
    births = BirthSteps(torch.zeros(50, 20))
    assert births.read().tolist() == torch.zeros(50, 20).tolist() and births.cohorts is None
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(steps), (50, 20), generator=generator)
    drawn.view(-1)[: len(steps)] = torch.arange(len(steps))
    written = torch.tensor(list(steps), dtype=torch.int32)[drawn]
    births.write(written)
    assert births.steps == list(steps)
    assert (births.cohorts is None) == (dtype is None)
    assert births.cohorts is None or births.cohorts.dtype == dtype
    assert births.read().dtype == torch.int32 and torch.equal(births.read(), written)


def test_of_nothing() -> None:
    births = BirthSteps(torch.zeros(0))
    births.write(torch.zeros(0, dtype=torch.int32))
    assert births.read().shape == (0,) and births.steps == [0]
