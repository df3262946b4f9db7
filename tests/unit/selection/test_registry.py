"""What every method with events must keep, and the event that the registry makes of it; new methods included.

Which weights a method prefers is compared with plain sorts in the tests in `methods/`.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from evidences import evidences
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparse_ds.selection.methods
from sparse_ds.config import methods as config_methods
from sparse_ds.config import parse_config
from sparse_ds.config.methods import all_methods
from sparse_ds.selection.evidence import Evidence, Growable
from sparse_ds.selection.registry import find_growth, select, select_resized, without
from sparse_ds.sparse.layout import SparseLayout

METHODS = [name for name, facts in all_methods().items() if facts.events != "none"]
every_method = pytest.mark.parametrize("method", METHODS)


def draw_staying(data: st.DataObject, evidence: Evidence) -> Tensor:
    stays = data.draw(st.lists(st.booleans(), min_size=evidence.indices.numel(), max_size=evidence.indices.numel()))
    return evidence.indices[torch.tensor(stays, dtype=torch.bool)]


def best_first(found: Growable) -> list[int]:
    pairs = zip(found.indices.tolist(), found.scores.tolist(), strict=True)
    return [index for index, _ in sorted(pairs, key=lambda pair: (-pair[1], pair[0]))]


@every_method
@settings(max_examples=60)
@given(data=st.data(), evidence=evidences())
def test_growable_keeps_its_word(method: str, data: st.DataObject, evidence: Evidence) -> None:
    staying = draw_staying(data, evidence)
    limit = data.draw(st.integers(0, evidence.layout.num_elements + 2))
    found = find_growth(method)(evidence, staying, limit)
    indices, scores = found
    assert indices.dtype == torch.int64 and scores.dtype == torch.float64
    assert indices.shape == scores.shape and indices.dim() == 1 and indices.numel() <= limit
    assert bool((indices[1:] > indices[:-1]).all()), "not ascending, or not unique"
    assert indices.numel() == 0 or (int(indices[0]) >= 0 and int(indices[-1]) < evidence.layout.num_elements)
    assert not set(indices.tolist()) & set(staying.tolist())
    assert bool(scores.isfinite().all()) and bool((scores >= 0).all())


@every_method
@settings(max_examples=60)
@given(data=st.data(), evidence=evidences())
def test_nothing_better_is_left_out(method: str, data: st.DataObject, evidence: Evidence) -> None:
    """But for the share of SFT-MA that is drawn at random: it is of what the best have left."""
    growth, staying = find_growth(method), draw_staying(data, evidence)
    limit = data.draw(st.integers(0, evidence.layout.num_elements))
    found = growth(evidence, staying, limit)
    everything = growth(replace(evidence, random_growth_fraction=0.0), staying, evidence.layout.num_elements)
    score_of = dict(zip(everything.indices.tolist(), everything.scores.tolist(), strict=True))
    assert found.indices.numel() == min(limit, everything.indices.numel())
    assert [score_of[index] for index in found.indices.tolist()] == found.scores.tolist()
    is_random = "random_growth_fraction" in all_methods()[method].keys
    share = Fraction(str(evidence.random_growth_fraction)) if is_random else 0
    num_random = int(share * found.indices.numel())
    num_best = found.indices.numel() - num_random
    assert set(best_first(everything)[:num_best]) <= set(found.indices.tolist())


@every_method
@settings(max_examples=40)
@given(data=st.data(), evidence=evidences())
def test_the_same_evidence_gives_the_same_growth_and_stays_as_it_is(
    method: str, data: st.DataObject, evidence: Evidence
) -> None:
    growth, staying = find_growth(method), draw_staying(data, evidence)
    limit = data.draw(st.integers(0, evidence.layout.num_elements))
    before = {name: part.clone() for name, part in vars(evidence).items() if isinstance(part, Tensor)}
    first, second = growth(evidence, staying, limit), growth(replace(evidence, **before), staying.clone(), limit)
    assert torch.equal(first.indices, second.indices) and torch.equal(first.scores, second.scores)
    assert all(torch.equal(getattr(evidence, name), part) for name, part in before.items())


@every_method
@settings(max_examples=60)
@given(data=st.data(), evidence=evidences())
def test_select_keeps_the_number_and_drops_as_many_as_can_grow(
    method: str, data: st.DataObject, evidence: Evidence
) -> None:
    growth, num_active = find_growth(method), evidence.indices.numel()
    k = data.draw(st.integers(0, num_active))
    result = select(growth, evidence, k)
    assert result.indices.shape == evidence.indices.shape and result.indices.dtype == evidence.indices.dtype
    # The largest number of dropped weights for which enough can grow, by trying all from above.
    walk = torch.sort(evidence.drop_scores, stable=True).indices
    for num in range(k, -1, -1):
        dropped = walk[:num].sort().values
        grown = growth(evidence, without(evidence.indices, dropped), num).indices
        if grown.numel() == num:
            break
    staying = without(evidence.indices, dropped)
    assert result.indices.tolist() == sorted([*staying.tolist(), *grown.tolist()])
    assert result.num_replaced == len(set(grown.tolist()) - set(evidence.indices.tolist()))


@every_method
@settings(max_examples=60)
@given(data=st.data(), evidence=evidences(num_active_at_least=1))
def test_select_resized_gives_the_number_that_was_asked_for(
    method: str, data: st.DataObject, evidence: Evidence
) -> None:
    growth, num_active = find_growth(method), evidence.indices.numel()
    num_to_drop = data.draw(st.integers(0, num_active))
    dropped = torch.sort(evidence.drop_scores, stable=True).indices[:num_to_drop].sort().values
    staying = without(evidence.indices, dropped)
    room = growth(evidence, staying, evidence.layout.num_elements).indices.numel()
    num_to_grow = data.draw(st.integers(0, room))
    result = select_resized(growth, evidence, num_to_drop, num_to_grow)
    assert result.indices.numel() == num_active - num_to_drop + num_to_grow
    grown = growth(evidence, staying, num_to_grow).indices
    assert result.indices.tolist() == sorted([*staying.tolist(), *grown.tolist()])
    with pytest.raises(AssertionError, match=f"w: {room} weights can grow, not {room + 1}"):
        select_resized(growth, evidence, num_to_drop, room + 1)


@every_method
def test_a_matrix_that_lost_all_weights_can_grow_again(method: str) -> None:
    """Redistribution can take the last weight of a matrix away, and give it some at a later event."""
    evidence = Evidence(
        name="w",
        layout=SparseLayout(2, 3, 1, spare_slots=3),
        indices=torch.empty(0, dtype=torch.int32),
        drop_scores=torch.empty(0),
        candidates=torch.tensor([1, 4], dtype=torch.int32),
        candidate_scores=torch.tensor([1.0, 2.0]),
        row_acc=torch.tensor([1.0, 2.0]),
        col_acc=torch.tensor([1.0, 2.0, 0.0]),
    )
    result = select_resized(find_growth(method), evidence, 0, 2)
    assert result.indices.tolist() in ([1, 4], [3, 4]) and result.source.tolist() == [-1, -1]


def test_a_method_without_events_is_not_asked_what_grows() -> None:
    with pytest.raises(AttributeError, match="growable"):
        find_growth("sparta")
    with pytest.raises(ModuleNotFoundError, match="sft_mb"):
        find_growth("sft_mb")


NEW_METHOD = '''"""Grows the first free weights."""
import torch

from sparse_ds.selection.evidence import Evidence, Growable

FACTS = {"summary": "the first free weights", "events": "repeated", "keys": ("sampling",)}


def growable(evidence, staying, limit):
    free = [i for i in range(evidence.layout.num_elements) if i not in set(staying.tolist())][:limit]
    return Growable(torch.tensor(free, dtype=torch.int64), torch.ones(len(free), dtype=torch.float64))
'''


@pytest.fixture
def methods_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the package's folder of methods, in its place."""
    folder = tmp_path / "methods"
    shutil.copytree(sparse_ds.selection.methods.__path__[0], folder)
    monkeypatch.setattr(config_methods, "METHOD_FOLDER", folder)
    monkeypatch.setattr(sparse_ds.selection.methods, "__path__", [str(folder)])
    all_methods.cache_clear()
    yield folder
    all_methods.cache_clear()
    sys.modules.pop("sparse_ds.selection.methods.first_free", None)


def test_a_new_method_is_one_new_file(methods_folder: Path) -> None:
    before = list(all_methods())
    (methods_folder / "first_free.py").write_text(NEW_METHOD, encoding="utf-8")
    (methods_folder / "_draft.py").write_text("", encoding="utf-8")
    (methods_folder / "notes.txt").write_text("", encoding="utf-8")
    all_methods.cache_clear()
    assert list(all_methods()) == [*sorted([*before[:-1], "first_free"]), "full"]
    assert all_methods()["first_free"].summary == "the first free weights"
    config = {
        "method": {"name": "first_free", "sampling": "exact", "interval_steps": 9},
        "optimizer": {"learning_rate": 0.1},
        "train": {"output_dir": "x"},
    }
    assert parse_config(config).method.name == "first_free"
    evidence = Evidence("w", SparseLayout(2, 3, 2), torch.tensor([0, 3]), torch.tensor([1.0, 0.5]))
    assert select(find_growth("first_free"), evidence, 1).indices.tolist() == [0, 1]


@pytest.mark.parametrize(
    "source", ["", "FACTS = make_facts()\n", "def f():\n    FACTS = {'summary': 'inside a function'}\n"]
)
def test_a_method_file_without_facts_is_refused(methods_folder: Path, source: str) -> None:
    (methods_folder / "first_free.py").write_text(source, encoding="utf-8")
    all_methods.cache_clear()
    with pytest.raises((AssertionError, ValueError)):
        all_methods()
