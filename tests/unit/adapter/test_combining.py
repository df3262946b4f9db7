"""Adapters put together, against the formulas written entry by entry over dictionaries."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_items import MakeBase
from safetensors.torch import load_file

from sparse_ds.adapter.adapter import AdapterBase, AdapterConfig, Deltas
from sparse_ds.adapter.aligned import CHUNK, aligned_chunks, union_of
from sparse_ds.adapter.combining import Combination, CombinedAdapter
from sparse_ds.adapter.native import NativeAdapter, load_adapter, save_adapter
from sparse_ds.adapter.valid_deltas import deltas_problem
from sparse_ds.config.errors import UserError
from sparse_ds.export.merged import merge_adapter

Q_PROJ, DOWN_PROJ, NORM = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.norm"
SHAPES = {Q_PROJ: (24, 24), DOWN_PROJ: (24, 40), NORM: (24, 1)}
BASE = AdapterBase(name="owner/tiny", quantization="none", dtype="float32")
Entries = dict[int, float]
Make = Callable[..., NativeAdapter]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make({module: {index: value}}, base fields..., config={...}) -> a saved adapter, opened."""
    made: list[Path] = []

    def make_one(
        entries: dict[str, Entries], *, config: dict[str, Any] | None = None, dense: Any = None, **base: Any
    ) -> NativeAdapter:
        folder = tmp_path / f"adapter_{len(made)}"
        made.append(folder)
        shapes = {name: SHAPES[name] for name in entries} | (config or {}).pop("shapes", {})
        fields = {"method": "sft_ag", "density": 0.1, "base": BASE.model_copy(update=base), "shapes": shapes}
        items = [
            (name, torch.tensor(sorted(own), dtype=torch.int64), torch.tensor([own[index] for index in sorted(own)]))
            for name, own in entries.items()
        ]
        save_adapter(folder, items, config=AdapterConfig(**fields, **(config or {})), dense=dense)
        return load_adapter(folder)

    return make_one


def random_entries(seed: int, modules: Sequence[str] = (Q_PROJ, DOWN_PROJ), share: float = 0.4) -> dict[str, Entries]:
    """fp32 values of few digits, so that equal |values|, opposite values and zeros happen."""
    draw = random.Random(seed)
    result = {}
    for name in modules:
        num_weights = SHAPES[name][0] * SHAPES[name][1]
        chosen = draw.sample(range(num_weights), int(share * num_weights))
        result[name] = {index: draw.randint(-12, 12) / 8 for index in chosen}
    return result


def entries_of(deltas: Deltas) -> Entries:
    assert deltas.values.dtype == torch.float32
    return dict(zip(deltas.indices.tolist(), deltas.values.tolist(), strict=True))


def rounded(entries: Entries) -> Entries:
    return {index: float(np.float32(value)) for index, value in entries.items()}


def trimmed(own: Entries, num_kept: int) -> Entries:
    order = sorted(own, key=lambda index: (-abs(own[index]), index))
    return {index: own[index] for index in order[:num_kept]}


def weighted_sum(all_entries: Sequence[Entries], weights: Sequence[float]) -> Entries:
    union = set().union(*all_entries)
    return {i: sum(w * own.get(i, 0.0) for own, w in zip(all_entries, weights, strict=True)) for i in union}


def elected(all_entries: Sequence[Entries], weights: Sequence[float]) -> Entries:
    """The election and the mean of TIES, one entry at a time."""
    result = {}
    for index in set().union(*all_entries):
        is_positive = sum(own.get(index, 0.0) for own in all_entries) >= 0
        agreeing = [
            weight * own[index]
            for own, weight in zip(all_entries, weights, strict=True)
            if own.get(index, 0.0) != 0 and (own[index] > 0) == is_positive
        ]
        result[index] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return result


@pytest.mark.parametrize("number", [2, 4])
def test_sum_linear_and_ties_are_the_formulas(make: Make, number: int) -> None:
    sources = [random_entries(seed) for seed in range(number)]
    sources[1][NORM] = {3: 0.5, 20: -0.25}  # a module that only one of them has
    adapters = [make(entries) for entries in sources]
    weights = (0.5, 0.3, -2.0, 1.25)[:number]
    positive = tuple(abs(weight) for weight in weights)
    for combination, oracle in [
        (Combination(), lambda own: weighted_sum(own, [1.0] * len(own))),
        (Combination("linear", weights=weights), lambda own: weighted_sum(own, weights)),
        (Combination("ties", density=1.0), lambda own: elected(own, [1.0] * len(own))),
        (
            Combination("ties", weights=positive, density=0.29),
            lambda own: elected([trimmed(entries, len(entries) * 29 // 100) for entries in own], positive),
        ),
    ]:
        merged = CombinedAdapter(adapters, combination)
        assert merged.config.method == f"merge_{combination.method}"
        assert set(merged.config.shapes) == {Q_PROJ, DOWN_PROJ, NORM}
        for name, deltas in merged.items():
            expected = oracle([entries.get(name, {}) for entries in sources])
            assert entries_of(deltas) == pytest.approx(rounded(expected), rel=1e-7, abs=1e-12), (combination, name)
            assert deltas_problem(name, SHAPES[name], deltas) is None
            assert merged.num_active[name] == len(expected)
        num_active = sum(len(deltas.indices) for _, deltas in merged.items())
        assert merged.config.density == num_active / (24 * 24 + 24 * 40 + 24)


def test_a_sum_is_rounded_once(make: Make) -> None:
    """2^24 + 1 - 2^24: in fp32, one after the other, it would be 0 or 2."""
    adapters = [make({Q_PROJ: {7: value}}) for value in (2.0**24, 1.0, -(2.0**24))]
    assert entries_of(CombinedAdapter(adapters).read(Q_PROJ)) == {7: 1.0}


def test_a_matrix_of_several_chunks(tmp_path: Path) -> None:
    """A union of more indices than are merged at a time, against dense vectors."""
    generator, num_weights = torch.Generator().manual_seed(0), 1200 * 1300
    adapters, dense = [], torch.zeros(num_weights, dtype=torch.float64)
    config = AdapterConfig(method="sparta", density=0.6, base=BASE, shapes={Q_PROJ: (1200, 1300)})
    for number in range(2):
        indices = (torch.rand(num_weights, generator=generator) < 0.6).nonzero().flatten()
        values = torch.randn(indices.numel(), generator=generator)
        dense.index_add_(0, indices, values.double())
        save_adapter(tmp_path / str(number), [(Q_PROJ, indices, values)], config=config)
        adapters.append(load_adapter(tmp_path / str(number)))
    indices, values = CombinedAdapter(adapters).read(Q_PROJ)
    assert indices.numel() > CHUNK and deltas_problem(Q_PROJ, (1200, 1300), Deltas(indices, values)) is None
    merged = torch.zeros(num_weights)
    merged[indices.long()] = values
    assert torch.equal(merged, dense.float())


def test_one_adapter_and_its_sum_are_the_same(make: Make) -> None:
    """Explicit zeros and modules without deltas included."""
    adapter = make({Q_PROJ: {0: 0.0, 5: 1.5, 575: -1e-30}, NORM: {}})
    merged = CombinedAdapter([adapter])
    for name, deltas in adapter.items():
        again = merged.read(name)
        assert torch.equal(again.indices, deltas.indices) and again.indices.dtype == deltas.indices.dtype
        assert torch.equal(again.values, deltas.values) and again.values.dtype == deltas.values.dtype
    assert merged.index_hash == adapter.index_hash


def test_dare_drops_by_seed_adapter_and_module_only(make: Make) -> None:
    every = dict.fromkeys(range(960), 1.0)
    full = make({Q_PROJ: dict.fromkeys(range(576), 1.0), DOWN_PROJ: every})
    other = make({DOWN_PROJ: {}})
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    def kept(adapters: list[NativeAdapter], seed: int = 0, name: str = DOWN_PROJ) -> Entries:
        return entries_of(CombinedAdapter(adapters, Combination("dare_linear", drop_rate=0.4, seed=seed)).read(name))

    as_first = kept([full, other])
    assert set(as_first.values()) == {float(np.float32(1 / 0.6))}
    # 960 drops at 0.4: the mean is 576 kept, one standard deviation 15.2.
    assert abs(len(as_first) - 576) < 5 * 15.2
    assert kept([full]) == kept([full, other, other]) == as_first
    as_second = kept([other, full])
    assert abs(len(as_second.keys() & as_first.keys()) - 960 * 0.36) < 5 * (960 * 0.36 * 0.64) ** 0.5
    assert kept([full], seed=1).keys() != as_first.keys()
    assert {i for i in as_first if i < 576} != set(kept([full], name=Q_PROJ))
    after = torch.random.get_rng_state(), np.random.get_state()[1], random.getstate()
    assert torch.equal(states[0], after[0]) and (states[1] == after[1]).all() and states[2] == after[2]


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_merges_what_it_leaves(make: Make, method: str) -> None:
    """What is left of each adapter alone, at its number, merged by the formulas."""
    sources, weights = [random_entries(seed, [DOWN_PROJ], share=0.8) for seed in range(3)], (0.5, 1.0, 2.0)
    adapters, empty = [make(entries) for entries in sources], make({DOWN_PROJ: {}})
    left = []
    for number, entries in enumerate(sources):
        alone = [adapters[number] if place == number else empty for place in range(3)]
        own = entries_of(CombinedAdapter(alone, Combination("dare_linear", drop_rate=0.5, seed=3)).read(DOWN_PROJ))
        assert all(value == 2 * entries[DOWN_PROJ][index] for index, value in own.items())
        assert 0.3 < len(own) / len(entries[DOWN_PROJ]) < 0.7
        left.append(own)
    merged = CombinedAdapter(adapters, Combination(method, weights=weights, drop_rate=0.5, seed=3))  # type: ignore[arg-type]
    expected = weighted_sum(left, weights) if method == "dare_linear" else elected(left, weights)
    assert entries_of(merged.read(DOWN_PROJ)) == pytest.approx(rounded(expected), rel=1e-7, abs=1e-12)


def test_chunks_of_any_size_are_the_same_table() -> None:
    generator = torch.Generator().manual_seed(0)
    deltas = []
    for num_active in (0, 1, 30, 57):
        indices = torch.randperm(90, generator=generator)[:num_active].sort().values.int()
        deltas.append(Deltas(indices, torch.randn(num_active, generator=generator)))
    assert union_of([own.indices for own in deltas]).tolist() == sorted(
        set().union(*(own.indices.tolist() for own in deltas))
    )
    (whole,) = aligned_chunks(deltas)
    for chunk in (1, 7, 200):
        parts = list(aligned_chunks(deltas, chunk=chunk))
        assert torch.equal(torch.cat([part.indices for part in parts]), whole.indices)
        assert torch.equal(torch.cat([part.values for part in parts], dim=1), whole.values)
        assert torch.equal(torch.cat([part.present for part in parts], dim=1), whole.present)
    for own, values, present in zip(deltas, whole.values, whole.present, strict=True):
        assert torch.equal(whole.indices[present], own.indices) and torch.equal(values[present], own.values.double())
        assert not values[~present].any()


def test_saved_and_merged_into_the_base(make: Make, make_base: MakeBase, tmp_path: Path) -> None:
    """A combined adapter is an adapter: it can be stored, and merged into a dense model."""
    base, sources = make_base(), [random_entries(seed) for seed in range(2)]
    merged = CombinedAdapter([make(entries) for entries in sources])
    save_adapter(tmp_path / "sum", ((name, *deltas) for name, deltas in merged.items()), config=merged.config)
    assert load_adapter(tmp_path / "sum").config.method == "merge_sum"
    merge_adapter(base, merged, tmp_path / "model", dtype="float32")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    for name, weight in before.items():
        added = torch.zeros(weight.numel())
        for entries in sources:
            for index, value in entries.get(name.removesuffix(".weight"), {}).items():
                added[index] += value  # eighths: exact
        assert torch.equal(after[name], weight + added.view_as(weight)), name


def two_adapters(make: Make, **changes: Any) -> list[NativeAdapter]:
    return [make({Q_PROJ: {1: 1.0}}), make({Q_PROJ: {2: 1.0}}, **changes)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"name": "owner/other"},
            r"base is 'owner/tiny' of the first and 'owner/other' of the second.*allow other base",
        ),
        ({"revision": "abc"}, r"base is 'owner/tiny' of the first and 'owner/tiny' \(revision abc\) of the second"),
        ({"quantization": "nf4"}, r"base\.quantization is none of the first and nf4 of the second"),
        ({"dtype": "bfloat16"}, r"base\.dtype is float32 of the first and bfloat16"),
        (
            {"config": {"task": "sequence_classification"}},
            r"task is causal_lm of the first and sequence_classification",
        ),
        ({"config": {"shapes": {Q_PROJ: (24, 48)}}}, r"shape of '.*q_proj' is \[24, 24\] of the first and \[24, 48\]"),
    ],
)
def test_adapters_of_other_bases_are_refused(make: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"do not belong together: .*{message}"):
        CombinedAdapter(two_adapters(make, **changes))


def test_names_of_the_base_may_be_allowed_to_differ(make: Make) -> None:
    merged = CombinedAdapter(two_adapters(make, name="owner/copy", revision="abc"), allow_other_names=True)
    assert merged.config.base == BASE
    # Only names: the form of the base is checked all the same.
    with pytest.raises(UserError, match=r"base\.quantization"):
        CombinedAdapter(two_adapters(make, name="owner/copy", quantization="nf4"), allow_other_names=True)


def test_hashes_of_the_base_are_compared_where_they_are_of_the_same_matrices(make: Make) -> None:
    first = make({Q_PROJ: {1: 1.0}}, weights_hash="a")
    second = make({Q_PROJ: {2: 1.0}}, weights_hash="b")
    with pytest.raises(UserError, match=r"base\.weights_hash is a of the first and b of the second"):
        CombinedAdapter([first, second], allow_other_names=True)
    assert CombinedAdapter([first, make({Q_PROJ: {2: 1.0}})]).config.base.weights_hash == "a"
    wider = make({Q_PROJ: {2: 1.0}, NORM: {1: 1.0}}, weights_hash="c")
    assert CombinedAdapter([first, wider]).config.base.weights_hash == "c"
    assert CombinedAdapter([first, make({NORM: {2: 1.0}}, weights_hash="d")]).config.base.weights_hash is None


def test_what_cannot_be_combined_is_refused(make: Make) -> None:
    with pytest.raises(UserError, match="No adapter was given"):
        CombinedAdapter([])
    config = {"dense_shapes": {"score.weight": (2, 24)}, "task": "sequence_classification", "labels": ("a", "b")}
    head = make({Q_PROJ: {1: 1.0}}, config={**config, "pad_token_id": 0}, dense={"score.weight": torch.zeros(2, 24)})
    with pytest.raises(UserError, match=r"trained as a whole \(score\.weight\).*multi-head"):
        CombinedAdapter([head, head])
    with pytest.raises(UserError, match=r"got 3 weights for 2 adapters"):
        CombinedAdapter(two_adapters(make), Combination("linear", weights=(1.0, 1.0, 1.0)))
    with pytest.raises(UserError, match="leaves no delta of 2 adapters"):
        CombinedAdapter(two_adapters(make), Combination("ties", density=0.5))
    large = [make({Q_PROJ: {1: 3e38}}) for _ in range(2)]
    with pytest.raises(UserError, match=r"values of '.*q_proj' that fp32 cannot hold"):
        CombinedAdapter(large).read(Q_PROJ)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "mean"}, "no such method; expected one of sum, linear, ties, dare_linear, dare_ties"),
        ({"method": "linear"}, "needs weights"),
        ({"method": "sum", "weights": (1.0,)}, "takes no weights"),
        ({"method": "ties"}, "needs a density"),
        ({"method": "sum", "density": 0.5}, "takes no density"),
        ({"method": "dare_ties", "drop_rate": 0.5, "density": 0.5}, "takes no density"),
        ({"method": "dare_linear"}, "needs a drop_rate"),
        ({"method": "ties", "density": 0.5, "drop_rate": 0.5}, "takes no drop_rate"),
        ({"method": "ties", "density": 0.5, "seed": 0}, "takes no seed"),
        ({"method": "ties", "density": 0.0}, "density is 0.0, expected a number above 0 and at most 1"),
        ({"method": "ties", "density": 1.5}, "density is 1.5"),
        ({"method": "dare_linear", "drop_rate": 1.0}, "drop_rate is 1.0, expected 0 or more and less than 1"),
        ({"method": "dare_linear", "drop_rate": float("nan")}, "drop_rate is nan"),
        ({"method": "linear", "weights": (1.0, 0.0)}, "a weight is 0.0"),
        ({"method": "linear", "weights": (1.0, float("inf"))}, "a weight is inf"),
        ({"method": "ties", "density": 0.5, "weights": (1.0, -1.0)}, "a weight is -1.0, expected numbers above 0"),
    ],
)
def test_settings_that_cannot_be_meant(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"Merging by '{fields['method']}': .*{message}"):
        Combination(**fields)
