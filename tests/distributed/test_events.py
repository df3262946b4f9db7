"""Drop-and-grow events in a real ZeRO-3 engine on 1, 2 and 3 ranks: what is gathered after one, what all agree on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from toy_engine import CPU, LAYOUTS, Toy, start_toy

from sparse_ds.distributed import zero3_partitions
from sparse_ds.distributed.process_group import rank, world_size
from sparse_ds.drop_grow.event import DropAndGrow, EventRecord
from sparse_ds.selection.apply_event import EventResult, apply_event
from sparse_ds.sparse.index_hash import hash_indices
from sparse_ds.sparse.layout import SparseLayout
from sparse_ds.training.callbacks import RunEvents
from sparse_ds.training.setup import make_drop_and_grow

X = torch.randn(6, 11, generator=torch.Generator().manual_seed(5))
EVENT_STEP = 4
GATHER_BYTES = 64
"""Of one batch of tensors: "first" takes 96 bytes and is a batch of its own, the two others are one."""


@dataclass(frozen=True)
class Scenario:
    """One engine and one event."""

    zero: dict[str, Any]
    after_evaluation: bool = False
    all_persistent: bool = False
    in_batches: bool = False


SCENARIOS = {
    "after evaluation": Scenario({}, after_evaluation=True),
    # A threshold above the size of every tensor of the toy: all of them stay gathered, always.
    "persistent": Scenario({"stage3_param_persistence_threshold": 1000}, after_evaluation=True, all_persistent=True),
    "offload": Scenario({"offload_optimizer": {"device": "cpu"}, "sub_group_size": 3}, in_batches=True),
}


def run_event(
    toy: Toy, drop_and_grow: DropAndGrow, num_to_replace: dict[str, int], before_release: Callable[[], None]
) -> EventRecord:
    """One event through the callback of a run."""
    records: list[EventRecord] = []

    def release() -> None:
        before_release()
        toy.engine.empty_partition_cache()

    callback = RunEvents(
        drop_and_grow, lambda step: num_to_replace if step == EVENT_STEP else None, release, records.append
    )
    for step in range(EVENT_STEP + 1):
        callback.on_step_end(None, SimpleNamespace(global_step=step), None)  # type: ignore[arg-type]
    (record,) = records
    return record


def check_carried_over(before: dict[str, Any], after: dict[str, Any], num_to_replace: dict[str, int]) -> int:
    """Kept weights keep value and momentum, grown ones have none; returns how many were grown."""
    num_grown_in_all = 0
    for name, (indices_K, values_K, momentum_K) in after.items():
        old_indices, old_values, old_momentum = before[name]
        assert bool((indices_K[1:] > indices_K[:-1]).all()), f"{name}: indices are not ascending"
        old = {int(i): (float(v), float(m)) for i, v, m in zip(old_indices, old_values, old_momentum, strict=True)}
        new = {int(i): (float(v), float(m)) for i, v, m in zip(indices_K, values_K, momentum_K, strict=True)}
        grown = new.keys() - old.keys()
        assert all(new[index] == (0.0, 0.0) for index in grown)
        assert all(new[index] == old[index] for index in new.keys() & old.keys())
        dropped = sorted(abs(old[index][0]) for index in old.keys() - new.keys())
        kept = [abs(old[index][0]) for index in old.keys() & new.keys()]
        assert len(grown) == num_to_replace[name]
        assert not dropped or not kept or dropped[-1] <= min(kept), f"{name}: not the smallest were dropped"
        num_grown_in_all += len(grown)
    return num_grown_in_all


def check_event(scenario: Scenario) -> dict[str, Any]:
    toy = start_toy(zero=scenario.zero)
    for _ in range(3):
        toy.train_step(X)
    if scenario.after_evaluation:
        for _ in range(3):
            toy.predict(X)
    output_before = toy.predict(X)
    num_stale = sum(p.ds_status.name == "AVAILABLE" for layer in toy.layers.values() for p in layer.parameters())
    before = toy.gather()
    assert all(values_K.count_nonzero() and momentum_K.count_nonzero() for _, values_K, momentum_K in before.values())
    num_to_replace = {"first": 3, "second": 1, "third": 2}
    stale_outputs: list[Tensor] = []
    # With one rank what is gathered is the partition itself, never stale.
    goes_stale = scenario.all_persistent and world_size() > 1
    with pytest.MonkeyPatch.context() as patch:
        if scenario.in_batches:
            patch.setattr(zero3_partitions, "GATHER_BYTES", GATHER_BYTES)
        record = run_event(
            toy,
            make_drop_and_grow(toy.optimizer, toy.layers, toy.master, CPU),
            num_to_replace,
            before_release=lambda: stale_outputs.append(toy.predict(X)) if goes_stale else None,
        )
    after = toy.gather()
    num_grown = check_carried_over(before, after, num_to_replace)
    assert (record.step, record.num_dropped, record.num_grown) == (EVENT_STEP, num_grown, num_grown)
    assert record.num_active == sum(layout.num_active for layout in LAYOUTS.values())
    assert record.index_hash == hash_indices((name, indices_K) for name, (indices_K, _, _) in after.items())
    output_after = toy.predict(X)
    assert torch.equal(output_after, toy.dense_predict(X)), "the forward pass does not see the event"
    assert not torch.equal(output_after, output_before)
    if goes_stale:
        # Why gathered parameters are released after an event: they hold the old contents.
        assert num_stale == sum(len(list(layer.parameters())) for layer in toy.layers.values())
        assert torch.equal(stale_outputs[0], output_before)
    toy.train_step(X)
    assert torch.equal(toy.predict(X), toy.dense_predict(X)), "the step after the event does not train what is gathered"
    check_padding_is_zero(toy)
    return {"hash": record.index_hash, "output": output_after.tolist(), "num_stale": num_stale}


def check_padding_is_zero(toy: Toy) -> None:
    for sub_group, flat in enumerate(toy.master.flats):
        is_padding = torch.ones(flat.numel(), dtype=torch.bool)
        for parameter in toy.master.parameters_of(sub_group):
            where = toy.master.slice_of(parameter)
            is_padding[where.offset : where.offset + where.num_real] = False
        assert not flat.detach()[is_padding].any()


def check_disagreement() -> str:
    """The last rank decides otherwise about one tensor: the message that every rank gets."""
    toy = start_toy()
    toy.train_step(X)

    def select(
        name: str, layout: SparseLayout, indices_K: Tensor, values_K: Tensor, num_to_replace: int
    ) -> EventResult:
        inactive = [i for i in range(layout.num_elements) if i not in set(indices_K.tolist())]
        differs = name == "third" and rank() == world_size() - 1
        grown = torch.tensor([inactive[-1] if differs else inactive[0]])
        return apply_event(indices_K, torch.tensor([0]), grown)

    drop_and_grow = DropAndGrow(toy.layers, toy.master, [], select, CPU)
    try:
        drop_and_grow.run(7, dict.fromkeys(toy.layers, 1))
    except RuntimeError as error:
        return str(error)
    return "no error"


def check_all() -> dict[str, Any]:
    results: dict[str, Any] = {name: check_event(scenario) for name, scenario in SCENARIOS.items()}
    return {**results, "disagreement": check_disagreement()}


@pytest.fixture(scope="module")
def results() -> dict[int, list[dict[str, Any]]]:
    return {num_ranks: run_ranks(num_ranks, check_all) for num_ranks in (1, 2, 3)}


def test_every_rank_and_every_world_size_comes_to_the_same_indices(results: dict[int, list[dict[str, Any]]]) -> None:
    """All ranks train on the same samples, so that the mean gradient is the same on any number of them."""
    reports = [report for ranks in results.values() for report in ranks]
    outputs = [scenario for report in reports for name, scenario in report.items() if name != "disagreement"]
    assert {scenario["hash"] for scenario in outputs} == {outputs[0]["hash"]}
    for scenario in outputs:
        # The mean of equal gradients over 3 ranks is rounded.
        torch.testing.assert_close(torch.tensor(scenario["output"]), torch.tensor(outputs[0]["output"]))


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_something_was_still_gathered_before_the_event(
    num_ranks: int, results: dict[int, list[dict[str, Any]]]
) -> None:
    """Else the scenarios that are about stale contents would show nothing."""
    for report in results[num_ranks]:
        assert report["persistent"]["num_stale"] > 0
        assert report["after evaluation"]["num_stale"] > 0


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_rank_that_decides_otherwise_stops_all_ranks(
    num_ranks: int, results: dict[int, list[dict[str, Any]]]
) -> None:
    for report in results[num_ranks]:
        message = report["disagreement"]
        assert message.startswith("the set of active weights after the event at step 7 differs between ranks: ")
        assert f"ranks [{num_ranks - 1}] have other values" in message


def test_one_rank_cannot_disagree(results: dict[int, list[dict[str, Any]]]) -> None:
    assert results[1][0]["disagreement"] == "no error"
