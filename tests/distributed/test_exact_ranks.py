"""1, 2 and 4 ranks end with the same indices, values and state, bit for bit, where every reduction is exact."""

from __future__ import annotations

from typing import Any

import pytest
from exact_run import ExactRun, run_config
from ranks import run_ranks

from sparse_ds.distributed.process_group import world_size

pytestmark = pytest.mark.slow

STEPS = 20
EVENTS = {"interval_steps": 5, "estimation_steps": 2, "initial_drop_fraction": 0.5}
CASES: dict[str, dict[str, Any]] = {
    "sft_ag": {"name": "sft_ag", **EVENTS, "gradient_tile_mib": 1},
    "sft_ag, step, change, cosine": {
        "name": "sft_ag",
        **EVENTS,
        "candidate_source": "step",
        "drop_criterion": "change",
        "drop_schedule": "cosine",
    },
    "sft_ag, redistribution": {"name": "sft_ag", **EVENTS, "redistribution_factor": 1.75},
    "sft_ma": {"name": "sft_ma", **EVENTS},
    "sft_ma, random share, redistribution": {
        "name": "sft_ma",
        **EVENTS,
        "random_growth_fraction": 0.3,
        "redistribution_factor": 1.5,
    },
    "sft_ag, blocks": {
        "name": "sft_ag",
        **EVENTS,
        "drop_schedule": "constant",
        "gradient_tile_mib": 1,
        "block_size": [2, 4],
    },
    "sft_ag, step, change, blocks of columns, redistribution": {
        "name": "sft_ag",
        **EVENTS,
        "candidate_source": "step",
        "drop_criterion": "change",
        "drop_schedule": "constant",
        "redistribution_factor": 1.75,
        "block_size": [1, 4],
    },
    "sft_ma, blocks, random share, redistribution": {
        "name": "sft_ma",
        **EVENTS,
        "random_growth_fraction": 0.3,
        "drop_schedule": "constant",
        "redistribution_factor": 1.5,
        "block_size": 2,
    },
    "accumulated_gradient, blocks": {"name": "accumulated_gradient", "estimation_steps": 3, "block_size": [4, 2]},
    "fisher": {"name": "fisher", "estimation_steps": 3},
    "accumulated_gradient": {"name": "accumulated_gradient", "estimation_steps": 3},
}


def run_all() -> dict[str, dict[str, Any]]:
    """Every case in turn in one process group."""
    outcomes = {}
    for name, method in CASES.items():
        config = run_config(method, num_ranks=world_size(), accumulation=2, steps=STEPS, density=0.11)
        run = ExactRun(config)
        run.train()
        outcomes[name] = run.outcome()
    return outcomes


@pytest.fixture(scope="module")
def outcomes() -> dict[int, dict[str, dict[str, Any]]]:
    found = {}
    for num_ranks in (1, 2, 4):
        of_ranks = run_ranks(num_ranks, run_all)
        assert all(outcome == of_ranks[0] for outcome in of_ranks)
        found[num_ranks] = of_ranks[0]
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_number_of_ranks_changes_not_a_bit(case: str, outcomes: dict[int, dict[str, dict[str, Any]]]) -> None:
    one = outcomes[1][case]
    num_events = 1 if CASES[case]["name"] in ("fisher", "accumulated_gradient") else 4
    assert len(set(one["hashes"])) == num_events, "every event must change the indices"
    assert all(replaced > 0 for replaced in one["replaced"])
    for num_ranks in (2, 4):
        # The square of a share depends on how the samples are dealt out: another statistic, not another result.
        if case != "fisher":
            assert outcomes[num_ranks][case] == one, f"{num_ranks} ranks"


@pytest.mark.parametrize("case", [case for case in CASES if "redistribution" in case])
def test_redistribution_moves_weights_and_keeps_their_number(
    case: str, outcomes: dict[int, dict[str, dict[str, Any]]]
) -> None:
    active = outcomes[1][case]["active"]
    assert len({sum(numbers) for numbers in active}) == 1
    assert len({tuple(numbers) for numbers in active}) > 1, "some event must move weights between tensors"


def test_ages_tell_when_weights_were_grown(outcomes: dict[int, dict[str, dict[str, Any]]]) -> None:
    """The first event (step 2, gamma = 2) replaces all: weights of SFT-AG are then 2 steps old, of SFT-MA 0."""
    assert set(outcomes[1]["sft_ag"]["births"][0]) <= {0}
    assert set(outcomes[1]["sft_ma"]["births"][0]) == {2}
    assert set(outcomes[1]["sft_ma"]["births"][-1]) <= {2, 7, 12, 17}
    for record in outcomes[1]["sft_ma"]["births"]:
        assert sum(record.values()) == sum(outcomes[1]["sft_ma"]["active"][0])


def run_with_constant_gradient() -> list[float]:
    """|step| / learning rate of every weight grown by the event, in the step after it; the gradient never changes."""
    config = run_config(CASES["sft_ag"], num_ranks=world_size(), accumulation=1, steps=STEPS, density=0.11)
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"weight_decay": 0.0})})
    run = ExactRun(config)
    batch = run.batch(0)
    run.batch = lambda number: batch  # type: ignore[method-assign]
    for step in (1, 2, 3):
        run.train_step(step)
    learning_rate = config.optimizer.learning_rate
    return [abs(value) / learning_rate for _, values, *_ in run.outcome()["tensors"].values() for value in values]


def test_the_first_step_of_a_seeded_weight_is_the_learning_rate() -> None:
    """The event of step 2 has replaced (nearly) all weights, with moments as if they had had both steps' gradients.

    Weights that were active from the start and grew again have made three such steps.
    """
    for num_ranks in (1, 2):
        steps = run_ranks(num_ranks, run_with_constant_gradient)[0]
        first = [step for step in steps if step < 2]
        assert len(first) > 0.8 * len(steps)
        assert all(abs(step - 1) < 1e-6 for step in first)
        assert all(abs(step - 3) < 3e-6 for step in steps if step >= 2)
