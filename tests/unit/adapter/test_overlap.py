"""Overlap of adapters, against sets and dictionaries of Python."""

from __future__ import annotations

import json
import random
from itertools import combinations
from pathlib import Path

import pytest
import torch

from sparse_ds.adapter.adapter import Adapter, AdapterBase, AdapterConfig
from sparse_ds.adapter.native import load_adapter, save_adapter
from sparse_ds.adapter.overlap import overlap
from sparse_ds.config.errors import UserError

SHAPES = {"model.layers.0.q_proj": (20, 30), "model.layers.0.v_proj": (10, 30), "model.layers.1.q_proj": (20, 30)}
Key = tuple[str, int]


@pytest.fixture
def sources() -> list[dict[Key, float]]:
    """Three adapters of different sizes; the third has no deltas for one module, and does not have another at all."""
    draw = random.Random(0)
    every = [(name, index) for name, (rows, cols) in SHAPES.items() for index in range(rows * cols)]
    sizes = (600, 300, 450)
    third = [key for key in every if key[0] == "model.layers.0.q_proj"]
    return [
        {key: draw.randint(-4, 4) / 4 for key in draw.sample(third if size == 450 else every, size)} for size in sizes
    ]


@pytest.fixture
def adapters(sources: list[dict[Key, float]], tmp_path: Path) -> list[Adapter]:
    base = AdapterBase(name="owner/tiny", quantization="none", dtype="bfloat16")
    opened: list[Adapter] = []
    for number, entries in enumerate(sources):
        names = list(SHAPES)[:2] if number == 2 else list(SHAPES)
        items = []
        for name in names:
            indices = sorted(index for module, index in entries if module == name)
            values = torch.tensor([entries[name, index] for index in indices])
            items.append((name, torch.tensor(indices, dtype=torch.int64), values))
        config = AdapterConfig(method="sparta", density=0.3, base=base, shapes={name: SHAPES[name] for name in names})
        save_adapter(tmp_path / str(number), items, config=config)
        opened.append(load_adapter(tmp_path / str(number)))
    return opened


def test_counts(sources: list[dict[Key, float]], adapters: list[Adapter]) -> None:
    report = overlap(adapters, names=["one", "two", "three"])
    assert report.num_active == [600, 300, 450]
    for (first, second), counts in report.pairs.items():
        a, b = sources[first], sources[second]
        both, union = a.keys() & b.keys(), a.keys() | b.keys()
        energy = {key: (a.get(key, 0) + b.get(key, 0)) ** 2 for key in union}
        conflicts = sum(a[key] * b[key] < 0 for key in both)
        assert (counts.num_shared, counts.num_union, counts.num_sign_conflicts) == (len(both), len(union), conflicts)
        assert counts.jaccard == len(both) / len(union) and counts.conflict_fraction == conflicts / len(both)
        assert counts.energy_fraction == pytest.approx(sum(energy[key] for key in both) / sum(energy.values()))
        by_chance = sum(
            sum(key[0] == name for key in a) * sum(key[0] == name for key in b) / (rows * cols)
            for name, (rows, cols) in SHAPES.items()
        )
        assert counts.num_shared_by_chance == pytest.approx(by_chance)
    assert set(report.pairs) == set(combinations(range(3), 2))
    union = set().union(*sources)
    held_by = {key: [entries[key] for entries in sources if key in entries] for key in union}
    assert report.num_shared_by == [sum(len(values) == n for values in held_by.values()) for n in (1, 2, 3)]
    assert report.in_all.num_shared == report.num_shared_by[1] + report.num_shared_by[2] > 0
    assert report.in_all.num_sign_conflicts == sum(min(v) < 0 < max(v) for v in held_by.values())
    shared_energy = sum(sum(v) ** 2 for v in held_by.values() if len(v) > 1)
    assert report.in_all.energy_fraction == pytest.approx(shared_energy / sum(sum(v) ** 2 for v in held_by.values()))


def test_random_sets_share_what_is_expected_by_chance(tmp_path: Path) -> None:
    """Three independent sets of 30 % of 40,000 weights: pairs share 3,600, at least two share 8,640."""
    base = AdapterBase(name="owner/tiny", quantization="none", dtype="bfloat16")
    config = AdapterConfig(method="sparta", density=0.3, base=base, shapes={"m": (200, 200)})
    generator, adapters = torch.Generator().manual_seed(0), []
    for number in range(3):
        indices = torch.randperm(40_000, generator=generator)[:12_000].sort().values
        save_adapter(tmp_path / str(number), [("m", indices, torch.ones(12_000))], config=config)
        adapters.append(load_adapter(tmp_path / str(number)))
    report = overlap(adapters)
    assert report.in_all.num_shared_by_chance == pytest.approx(40_000 * (3 * 0.3**2 * 0.7 + 0.3**3))
    # Standard deviations: below sqrt(40,000 * p * (1 - p)), 57 for a pair and 82 for all.
    assert abs(report.in_all.num_shared - report.in_all.num_shared_by_chance) < 5 * 82
    for counts in report.pairs.values():
        assert counts.num_shared_by_chance == pytest.approx(3600)
        assert abs(counts.num_shared - 3600) < 5 * 57
        assert counts.num_sign_conflicts == 0


def test_a_matrix_of_several_chunks(tmp_path: Path) -> None:
    """A union of 1.2 million indices, more than are looked at at a time."""
    base = AdapterBase(name="owner/tiny", quantization="none", dtype="bfloat16")
    config = AdapterConfig(method="full", density=1.0, base=base, shapes={"m": (1100, 1200)})
    adapters = []
    for number, (first, end) in enumerate(((0, 1_200_000), (60_000, 1_260_000))):
        values = torch.full((1_200_000,), -1.0 if number else 2.0)
        save_adapter(tmp_path / str(number), [("m", torch.arange(first, end), values)], config=config)
        adapters.append(load_adapter(tmp_path / str(number)))
    counts = overlap(adapters).in_all
    assert (counts.num_union, counts.num_shared) == (1_260_000, 1_140_000)
    assert counts.num_sign_conflicts == 1_140_000 and counts.shared_energy == 1_140_000
    assert counts.energy == 1_140_000 + 60_000 * 4 + 60_000


def test_json_and_table(adapters: list[Adapter]) -> None:
    report = overlap(adapters[:2])
    content = json.loads(json.dumps(report.to_dict()))
    (pair,) = content["pairs"]
    assert pair["fraction_of_first"] == pair["num_shared"] / 600
    assert pair["fraction_of_second"] == pair["num_shared"] / 300
    assert content["adapters"][1] == {"name": str(adapters[1].folder), "num_active": 300}
    assert pair["num_shared"] == content["in_all"]["num_shared"]
    lines = report.table().splitlines()
    assert str(adapters[0].folder) in lines[0] and "600" in lines[0]
    assert "all" not in [line.split()[0] for line in lines if line]
    row = next(line for line in lines if line.strip().startswith("0, 1"))
    assert f"{pair['num_shared']:,}" in row and f"{pair['jaccard']:.2%}" in row
    assert any(line.strip().startswith("all") for line in overlap(adapters).table().splitlines())


def test_what_cannot_be_compared(adapters: list[Adapter], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Got 1 adapter\(s\) to compare"):
        overlap(adapters[:1])
    config = adapters[0].config.model_copy(update={"base": adapters[0].config.base.model_copy(update={"name": "o/p"})})
    items = ((name, *deltas) for name, deltas in adapters[0].items())
    save_adapter(tmp_path / "other", items, config=config)
    other = load_adapter(tmp_path / "other")
    with pytest.raises(UserError, match="do not belong together: base"):
        overlap([adapters[0], other])
    report = overlap([adapters[0], other], allow_other_names=True)
    assert report.in_all.jaccard == 1 and report.in_all.num_sign_conflicts == 0


def test_nothing_in_common(tmp_path: Path) -> None:
    """No division by zero where nothing is shared, or nothing is there."""
    base = AdapterBase(name="owner/tiny", quantization="none", dtype="bfloat16")
    config = AdapterConfig(method="sparta", density=0.3, base=base, shapes={"m": (4, 4)})
    adapters = []
    for number, indices in enumerate(([0, 1], [], [])):
        save_adapter(
            tmp_path / str(number), [("m", torch.tensor(indices).long(), torch.ones(len(indices)))], config=config
        )
        adapters.append(load_adapter(tmp_path / str(number)))
    report = overlap(adapters)
    assert report.in_all.num_shared == 0 and report.pairs[1, 2].jaccard == 0
    assert report.to_dict()["pairs"][2]["fraction_of_first"] == 0 and "0.00%" in report.table()
