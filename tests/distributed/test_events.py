"""Drop-and-grow events in a real ZeRO-3 engine on 1, 2 and 3 ranks: what is gathered after one, what all agree on."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from toy_engine import CPU, LAYOUTS, Toy, start_toy

from sparse_ds.distributed import zero3_partitions
from sparse_ds.distributed.process_group import rank, world_size
from sparse_ds.drop_grow.estimation import EstimationPhase
from sparse_ds.drop_grow.event import DropAndGrow, EventRecord, Seeds
from sparse_ds.optim.sparse_adamw import SparseAdamW
from sparse_ds.selection.evidence import Evidence, Growable
from sparse_ds.sparse.index_hash import hash_indices
from sparse_ds.training.callbacks import RunEvents
from sparse_ds.training.setup import make_drop_and_grow, make_estimation

X = torch.randn(6, 11, generator=torch.Generator().manual_seed(5))
EVENT_STEP = 4
ESTIMATION_STEPS = (3, 4)
NUM_TO_REPLACE = {"first": 3, "second": 1, "third": 2}
GATHER_BYTES = 100
"""Of one batch of tensors with momentum and birth_step: "first" takes 128 bytes and is a batch of its own, the two
others are one."""


@dataclass(frozen=True)
class Scenario:
    """One engine and one event, or two."""

    zero: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=lambda: {"name": "sft_ma"})
    event_steps: tuple[int, ...] = (EVENT_STEP,)
    after_evaluation: bool = False
    all_persistent: bool = False
    in_batches: bool = False


OFFLOAD = {"offload_optimizer": {"device": "cpu"}, "sub_group_size": 3}
SCENARIOS = {
    "after evaluation": Scenario(after_evaluation=True),
    # A threshold above the size of every tensor of the toy: all of them stay gathered, always.
    "persistent": Scenario({"stage3_param_persistence_threshold": 1000}, after_evaluation=True, all_persistent=True),
    "offload": Scenario(OFFLOAD, in_batches=True),
    "change": Scenario(method={"name": "sft_ma", "drop_criterion": "change"}, event_steps=(2, EVENT_STEP)),
    "sft_ag": Scenario(method={"name": "sft_ag"}, after_evaluation=True),
    "sft_ag, offload": Scenario(OFFLOAD, method={"name": "sft_ag"}, in_batches=True),
    "redistribution": Scenario(method={"name": "sft_ag", "redistribution_factor": 3.0}, after_evaluation=True),
    "sft_ma, redistribution": Scenario(method={"name": "sft_ma", "redistribution_factor": 3.0}),
}
SAME_METHOD = [["after evaluation", "persistent", "offload"], ["sft_ag", "sft_ag, offload"]]
"""Scenarios that must come to the same indices."""


class Driver:
    """The callback of a run with the toy's events, and the dense gradients of the estimation steps."""

    def __init__(self, toy: Toy, event_steps: tuple[int, ...], *, engine: Any = None, goes_stale: bool = False) -> None:
        self.toy, self.goes_stale = toy, goes_stale
        self.records: list[EventRecord] = []
        self.stale_outputs: list[Tensor] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.estimation: EstimationPhase | None = make_estimation(toy.config, toy.layers, CPU)
        schedule = SimpleNamespace(
            is_event=lambda step: step in event_steps,
            is_estimation=lambda step: step in ESTIMATION_STEPS,
            is_paused=lambda step: False,
            num_to_replace=lambda step: NUM_TO_REPLACE,
        )
        self.callback = RunEvents(
            schedule,  # type: ignore[arg-type]
            self.estimation,
            make_drop_and_grow(
                toy.config, toy.optimizer, toy.layers, toy.master, toy.weight_states, self.estimation, CPU
            ),
            toy.optimizer,
            engine or toy.engine,
            self._release,
            self.records.append,
        )

    def train(self, step: int) -> None:
        """Up to what comes after an optimizer step."""
        if step in ESTIMATION_STEPS:
            self.gradients.append(self.toy.dense_gradients(X))
        self.callback.on_step_begin(None, SimpleNamespace(global_step=step - 1), None)  # type: ignore[arg-type]
        self.toy.train_step(X)
        self.callback.on_optimizer_step(None, SimpleNamespace(global_step=step - 1), None)  # type: ignore[arg-type]

    def end(self, step: int) -> None:
        self.callback.on_step_end(None, SimpleNamespace(global_step=step), None)  # type: ignore[arg-type]

    def _release(self) -> None:
        if self.goes_stale:
            self.stale_outputs.append(self.toy.predict(X))
        zero3_partitions.release_gathered(self.toy.engine)


def check_carried_over(driver: Driver, before: dict[str, Any], after: dict[str, Any]) -> int:
    """Kept weights keep value and state, grown ones begin as they should; returns how many were grown."""
    toy = driver.toy
    redistributes = toy.config.method.redistribution_factor is not None
    num_grown_in_all = 0
    for name, new_parts in after.items():
        old_parts = before[name]
        assert old_parts.keys() == new_parts.keys() and {"exp_avg", "birth_step"} < new_parts.keys()
        indices_K = new_parts["indices"]
        assert bool((indices_K[1:] > indices_K[:-1]).all()), f"{name}: indices are not ascending"
        old = {int(index): slot for slot, index in enumerate(old_parts["indices"])}
        new = {int(index): slot for slot, index in enumerate(indices_K)}
        scores = old_parts["values"].abs()
        if "event_value" in old_parts:
            scores = (old_parts["values"] - old_parts["event_value"]).abs()
            assert torch.equal(new_parts["event_value"], new_parts["values"])
        for index in new.keys() & old.keys():
            for part in new_parts.keys() - {"event_value"}:
                assert torch.equal(new_parts[part][new[index]], old_parts[part][old[index]]), (name, part)
        grown = sorted(new.keys() - old.keys())
        slots = torch.tensor([new[index] for index in grown], dtype=torch.int64)
        assert not new_parts["values"][slots].any()
        if isinstance(toy.optimizer, SparseAdamW):
            check_seeds(driver, name, grown, {part: whole[slots] for part, whole in new_parts.items()})
        else:
            assert not new_parts["exp_avg"][slots].any()
            assert new_parts["birth_step"][slots].tolist() == [EVENT_STEP] * len(grown)
        left = old.keys() - new.keys()
        smallest = set(old_parts["indices"][scores.argsort(stable=True)[: NUM_TO_REPLACE[name]]].tolist())
        assert left <= smallest, f"{name}: not the smallest were dropped"
        if not redistributes:
            assert len(grown) == len(left) and len(new) == len(old)
        if toy.config.method.name == "sft_ma":
            # Of the weights that were inactive, so that none of the dropped comes back.
            assert left == smallest
        num_grown_in_all += len(grown)
    if driver.toy.config.method.drop_criterion == "change":
        assert any(parts["event_value"].count_nonzero() for parts in before.values()), "as good as the magnitude"
    num_active = [sum(len(parts["indices"]) for parts in state.values()) for state in (before, after)]
    assert num_active[0] == num_active[1]
    return num_grown_in_all


def check_seeds(driver: Driver, name: str, grown: list[int], seeds: dict[str, Tensor]) -> None:
    """Moments as if the gradients of the phase had gone into them, of candidates only."""
    num_slots, num_steps = driver.toy.layers[name].layout.num_slots, len(ESTIMATION_STEPS)
    gradients = torch.stack([gradients[name] for gradients in driver.gradients])
    assert gradients.shape[0] == num_steps
    candidates = gradients[0].abs().sort(descending=True, stable=True).indices[:num_slots]
    assert set(grown) <= set(candidates.tolist())
    seen = gradients[:, torch.tensor(grown, dtype=torch.int64)]
    beta1, beta2 = driver.toy.config.optimizer.betas
    # The gradients of the engine and of the dense model are sums of the same products in another order.
    torch.testing.assert_close(seeds["exp_avg"], (1 - beta1**num_steps) * seen.mean(0), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(
        seeds["exp_avg_sq"], (1 - beta2**num_steps) * seen.square().mean(0), rtol=1e-4, atol=1e-9
    )
    assert seeds["birth_step"].tolist() == [EVENT_STEP - num_steps] * len(grown)


def check_event(scenario: Scenario) -> dict[str, Any]:
    toy = start_toy(zero=scenario.zero, method=scenario.method)
    # With one rank what is gathered is the partition itself, never stale.
    goes_stale = scenario.all_persistent and world_size() > 1
    driver = Driver(toy, scenario.event_steps, goes_stale=goes_stale)
    for step in range(1, EVENT_STEP):
        driver.train(step)
        driver.end(step)
    driver.train(EVENT_STEP)
    assert len(driver.records) == len(scenario.event_steps) - 1
    if scenario.after_evaluation:
        for _ in range(3):
            toy.predict(X)
    output_before = toy.predict(X)
    num_stale = sum(p.ds_status.name == "AVAILABLE" for layer in toy.layers.values() for p in layer.parameters())
    before = toy.gather()
    assert all(parts["values"].count_nonzero() and parts["exp_avg"].count_nonzero() for parts in before.values())
    with pytest.MonkeyPatch.context() as patch:
        if scenario.in_batches:
            patch.setattr(zero3_partitions, "GATHER_BYTES", GATHER_BYTES)
        driver.end(EVENT_STEP)
    record = driver.records[-1]
    after = toy.gather()
    num_grown = check_carried_over(driver, before, after)
    check_record(record, before, after, num_grown)
    output_after = toy.predict(X)
    assert torch.equal(output_after, toy.dense_predict(X)), "the forward pass does not see the event"
    assert not torch.equal(output_after, output_before)
    if goes_stale:
        # Why gathered parameters are released after an event: they hold the old contents.
        assert num_stale == sum(len(list(layer.parameters())) for layer in toy.layers.values())
        assert torch.equal(driver.stale_outputs[-1], output_before)
    toy.train_step(X)
    assert torch.equal(toy.predict(X), toy.dense_predict(X)), "the step after the event does not train what is gathered"
    check_padding_is_zero(toy)
    sizes = [len(parts["indices"]) for parts in after.values()]
    return {"hash": record.index_hash, "output": output_after.tolist(), "num_stale": num_stale, "sizes": sizes}


def check_record(record: EventRecord, before: dict[str, Any], after: dict[str, Any], num_grown: int) -> None:
    assert (record.step, record.num_dropped, record.num_grown) == (EVENT_STEP, num_grown, num_grown)
    assert record.num_active == sum(layout.num_active for layout in LAYOUTS.values())
    assert record.index_hash == hash_indices((name, parts["indices"]) for name, parts in after.items())
    births: dict[int, int] = {}
    for name, parts in after.items():
        tensor, positions = record.tensors[name], parts["indices"].tolist()
        num_cols = LAYOUTS[name].num_cols
        assert tensor.num_active == len(positions)
        assert tensor.num_replaced == len(set(positions) - set(before[name]["indices"].tolist()))
        assert tensor.num_rows == len({position // num_cols for position in positions})
        assert tensor.num_cols == len({position % num_cols for position in positions})
        for birth in parts["birth_step"].tolist():
            births[birth] = births.get(birth, 0) + 1
    assert record.birth_steps == births and list(record.birth_steps) == sorted(births)


def check_padding_is_zero(toy: Toy) -> None:
    """Between the parameters in the flat masters, and behind the active weights of each."""
    for sub_group, flat in enumerate(toy.master.flats):
        is_padding = torch.ones(flat.numel(), dtype=torch.bool)
        for parameter in toy.master.parameters_of(sub_group):
            where = toy.master.slice_of(parameter)
            is_padding[where.offset : where.offset + where.num_real] = False
        assert not flat.detach()[is_padding].any()
    for name, parts in toy.gather_slots().items():
        layer = toy.layers[name]
        assert layer.num_active <= layer.layout.num_slots
        for part, whole in parts.items():
            assert whole.numel() == layer.layout.num_slots
            assert not whole[layer.num_active :].any(), (name, part)


def check_disagreement() -> str:
    """The last rank decides otherwise about one tensor: the message that every rank gets."""
    toy = start_toy()
    toy.train_step(X)

    def growable(evidence: Evidence, staying: Tensor, limit: int) -> Growable:
        active = set(evidence.indices.tolist())
        inactive = [i for i in range(evidence.layout.num_elements) if i not in active]
        differs = evidence.name == "third" and rank() == world_size() - 1
        grown = torch.tensor([inactive[-1] if differs else inactive[0]])
        return Growable(grown, torch.ones(1, dtype=torch.float64))

    drop_and_grow = DropAndGrow(
        toy.layers,
        toy.master,
        toy.weight_states,
        growable,
        estimation=None,
        accumulators=None,
        seed=0,
        random_growth_fraction=0.0,
        redistributes=False,
        device=CPU,
    )
    try:
        drop_and_grow.run(7, dict.fromkeys(toy.layers, 1), Seeds(None, 7))
    except RuntimeError as error:
        return str(error)
    return "no error"


def check_skipped_phase(method: dict[str, Any]) -> str:
    """An event of which the engine skipped every estimation step changes nothing: there is nothing to decide by."""
    toy = start_toy(method=method)
    skipping = SimpleNamespace(was_step_applied=lambda: False)
    driver = Driver(toy, (EVENT_STEP,), engine=skipping)
    for step in range(1, EVENT_STEP + 1):
        driver.train(step)
    before = toy.gather()
    try:
        driver.end(EVENT_STEP)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    after = toy.gather()
    unchanged = all(torch.equal(before[name][part], after[name][part]) for name in before for part in before[name])
    assert driver.estimation is not None
    in_phase = driver.estimation.is_running
    return f"unchanged: {unchanged}, replaced: {driver.records[0].num_grown}, still in the phase: {in_phase}"


def check_all() -> dict[str, Any]:
    results: dict[str, Any] = {name: check_event(scenario) for name, scenario in SCENARIOS.items()}
    skipped = {
        "alone": check_skipped_phase({"name": "sft_ag"}),
        "step": check_skipped_phase({"name": "sft_ag", "candidate_source": "step"}),
        "redistribution": check_skipped_phase({"name": "sft_ag", "redistribution_factor": 2.0}),
    }
    return {**results, "disagreement": check_disagreement(), "skipped": skipped}


@pytest.fixture(scope="module")
def results() -> dict[int, list[dict[str, Any]]]:
    return {num_ranks: run_ranks(num_ranks, check_all) for num_ranks in (1, 2, 3)}


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_rank_and_every_world_size_comes_to_the_same_indices(
    name: str, results: dict[int, list[dict[str, Any]]]
) -> None:
    """All ranks train on the same samples, so that the mean gradient is the same on any number of them."""
    outcomes = [report[name] for ranks in results.values() for report in ranks]
    assert {outcome["hash"] for outcome in outcomes} == {outcomes[0]["hash"]}
    for outcome in outcomes:
        # The mean of equal gradients over 3 ranks is rounded.
        torch.testing.assert_close(torch.tensor(outcome["output"]), torch.tensor(outcomes[0]["output"]))


@pytest.mark.parametrize("names", SAME_METHOD, ids=", ".join)
def test_how_the_engine_keeps_its_state_does_not_matter(
    names: list[str], results: dict[int, list[dict[str, Any]]]
) -> None:
    first, *others = [results[1][0][name] for name in names]
    for other in others:
        assert other["hash"] == first["hash"]
        torch.testing.assert_close(torch.tensor(other["output"]), torch.tensor(first["output"]))


@pytest.mark.parametrize("name", ["redistribution", "sft_ma, redistribution"])
def test_redistribution_moves_weights_between_tensors(name: str, results: dict[int, list[dict[str, Any]]]) -> None:
    sizes = results[1][0][name]["sizes"]
    assert sizes != [layout.num_active for layout in LAYOUTS.values()]
    assert sum(sizes) == sum(layout.num_active for layout in LAYOUTS.values())


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_something_was_still_gathered_before_the_event(
    num_ranks: int, results: dict[int, list[dict[str, Any]]]
) -> None:
    """Else the scenarios that are about stale contents would show nothing."""
    for report in results[num_ranks]:
        assert report["persistent"]["num_stale"] > 0
        assert report["after evaluation"]["num_stale"] > 0


@pytest.mark.parametrize("kind", ["alone", "step", "redistribution"])
def test_a_phase_without_a_counted_step_changes_nothing(kind: str, results: dict[int, list[dict[str, Any]]]) -> None:
    for ranks in results.values():
        for report in ranks:
            assert report["skipped"][kind] == "unchanged: True, replaced: 0, still in the phase: False"


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
