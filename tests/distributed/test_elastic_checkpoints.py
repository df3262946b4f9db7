"""A run that goes on from checkpoint to checkpoint on other numbers of ranks ends as if it had never stopped.

Every reduction of these runs is exact (`exact_run`), so the comparison is bit for bit, with a run on one rank that has
never seen a checkpoint.
"""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
from exact_run import ExactRun, run_config
from ranks import run_ranks
from safetensors import safe_open

from sparse_ds.checkpoint.reading import Checkpoint
from sparse_ds.checkpoint.run_folder import find_checkpoint
from sparse_ds.checkpoint.writing import CheckpointWrite, IndexContent
from sparse_ds.config.errors import UserError
from sparse_ds.distributed.process_group import gather, rank, world_size
from sparse_ds.distributed.zero3_partitions import release_gathered
from sparse_ds.training.engine_state import EngineCounters, EngineState

STEPS = 16
EVENTS = {"interval_steps": 5, "estimation_steps": 3, "initial_drop_fraction": 0.5}
"""Events after steps 3, 8 and 13; steps 1 to 3, 6 to 8 and 11 to 13 are estimation."""
CHAIN = [(4, 5), (2, 7), (3, 11), (1, STEPS)]
"""(ranks, last step) of each part: it stops between two phases, then twice inside of one."""
CASES: dict[str, dict[str, Any]] = {
    "sft_ag": {"name": "sft_ag", **EVENTS},
    "sft_ag, step, change, redistribution": {
        "name": "sft_ag",
        **EVENTS,
        "candidate_source": "step",
        "drop_criterion": "change",
        "redistribution_factor": 1.75,
    },
    "sft_ma": {"name": "sft_ma", **EVENTS},
    "sft_ag, blocks": {"name": "sft_ag", **EVENTS, "drop_schedule": "constant", "block_size": [2, 4]},
    "sft_ma, blocks": {"name": "sft_ma", **EVENTS, "drop_schedule": "constant", "block_size": [1, 4]},
}
ALTERNATING = "sft_ag, change, redistribution, indices stored in turns"
"""The first and the third part of the chain store them compactly; the run that never stops does not."""
CASES[ALTERNATING] = {"name": "sft_ag", **EVENTS, "drop_criterion": "change", "redistribution_factor": 1.75}
COMPACT_UNTIL = (5, 11)
"""Last steps of those parts."""
BYTES_PER_WEIGHT = {
    "sft_ag": (20, 12),
    "sft_ag, step, change, redistribution": (24, 12),
    "sft_ma": (12, 0),
    "sft_ag, blocks": (16 + 4 / 8, 8 + 4 / 8),
    "sft_ma, blocks": (8 + 4 / 4, 0),
    ALTERNATING: (24, 12),
}
"""Of indices, values and state; and of an estimation phase."""


def make_run(case: str, last_step: int = STEPS) -> tuple[ExactRun, EngineState]:
    method = CASES[case]
    if case == ALTERNATING and last_step in COMPACT_UNTIL:
        method = {**method, "index_storage": "compact"}
    config = run_config(method, num_ranks=world_size(), accumulation=2, steps=STEPS, density=0.11)
    run = ExactRun(config)
    return run, EngineState(run.layers, {}, run.master, run.optimizer, run.weight_states, run.estimation)


def save(engine: EngineState, folder: Path, step: int) -> None:
    write = CheckpointWrite(folder / f"checkpoint-{step}", step)
    slices = engine.slices(step)
    hashes = gather(write.write(slices))
    run_state = {"engine": engine.counters().model_dump()}
    write.publish(hashes, {item.name: item.entry for item in slices}, IndexContent({}, run_state, "{}"))


def restore(run: ExactRun, engine: EngineState, folder: Path) -> int:
    checkpoint = find_checkpoint(folder, "auto")
    assert checkpoint is not None
    names = engine.restore(checkpoint, EngineCounters.model_validate(checkpoint.index.run_state["engine"]))
    assert names == checkpoint.names
    release_gathered(run.engine)
    return checkpoint.index.step


def run_parts(folder: str, last_step: int) -> dict[str, dict[str, Any]]:
    """Every case from its newest checkpoint, if there is one, to `last_step`, saved there."""
    outcomes = {}
    for case in CASES:
        run, engine = make_run(case, last_step)
        done = restore(run, engine, Path(folder) / case) if (Path(folder) / case).exists() else 0
        for step in range(done + 1, last_step + 1):
            run.train_step(step)
        save(engine, Path(folder) / case, last_step)
        outcomes[case] = run.outcome()
    return outcomes


@pytest.fixture(scope="module")
def chained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Folder with the checkpoints of all parts, and the outcomes of the last."""
    folder = tmp_path_factory.mktemp("chain")
    outcomes: list[dict[str, dict[str, Any]]] = []
    for num_ranks, last_step in CHAIN:
        outcomes = run_ranks(num_ranks, run_parts, str(folder), last_step)
    return folder, outcomes[0]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The same on one rank, without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run_ranks(1, run_parts, str(folder), STEPS)[0]


@pytest.mark.parametrize("case", CASES)
def test_4_then_2_then_3_then_1_ranks_is_one_run(
    case: str,
    chained: tuple[Path, dict[str, dict[str, Any]]],
    uninterrupted: tuple[Path, dict[str, dict[str, Any]]],
) -> None:
    outcome, expected = chained[1][case], uninterrupted[1][case]
    assert outcome["tensors"] == expected["tensors"]
    # The last part has seen the last event only.
    assert outcome["hashes"] == expected["hashes"][-1:] and len(set(expected["hashes"])) == 3
    assert outcome["births"] == expected["births"][-1:]
    assert expected["replaced"][-1] > 0


@pytest.mark.parametrize("case", CASES)
def test_the_last_checkpoint_does_not_tell_how_the_run_came_there(
    case: str,
    chained: tuple[Path, dict[str, dict[str, Any]]],
    uninterrupted: tuple[Path, dict[str, dict[str, Any]]],
) -> None:
    """Not only what an outcome shows: every byte of the state."""
    left, right = (folder / case / f"checkpoint-{STEPS}" for folder in (chained[0], uninterrupted[0]))
    for name in ("state-00001-of-00001.safetensors", "checkpoint.json"):
        assert (left / name).read_bytes() == (right / name).read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_files_are_slices_of_one_size_that_together_are_the_whole(
    case: str, chained: tuple[Path, dict[str, dict[str, Any]]]
) -> None:
    """Read by the library alone."""
    for num_ranks, step in CHAIN:
        folder = chained[0] / case / f"checkpoint-{step}"
        index = json.loads((folder / "checkpoint.json").read_text())
        joined: dict[str, list[Any]] = {name: [] for name in index["tensors"]}
        for number in range(1, num_ranks + 1):
            with safe_open(folder / f"state-{number:05d}-of-{num_ranks:05d}.safetensors", framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    joined[name] += file.get_tensor(name).tolist()
        for name, entry in index["tensors"].items():
            assert len(joined[name]) == entry["num_elements"]
            assert Checkpoint(folder).read(name).tolist() == joined[name]
        assert len(list(folder.iterdir())) == num_ranks + 2


@pytest.mark.parametrize("case", CASES)
def test_bytes_per_active_weight(case: str, chained: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    for _, step in CHAIN:
        index = Checkpoint(chained[0] / case / f"checkpoint-{step}").index
        num_active = sum(index.run_state["engine"]["num_active"].values())
        state, phase = 0, 0
        for name, entry in index.tensors.items():
            num_bytes = entry.num_elements * {"F32": 4, "I32": 4}[entry.dtype]
            if name.endswith(("candidates", "gradient_sum", "gradient_square_sum")):
                phase += num_bytes
            elif not name.endswith("accumulator"):
                state += num_bytes
        of_weight, of_candidate = BYTES_PER_WEIGHT[case]
        assert state == of_weight * num_active
        is_estimating = step in (7, 11)
        if "redistribution" in case:
            assert (phase > of_candidate * num_active) == is_estimating, "there is a candidate for every slot"
        else:
            assert phase == of_candidate * num_active * is_estimating


def save_with_one_full_disk(folder: str) -> tuple[str, list[str], list[str]]:
    """A checkpoint, then one that rank 1 cannot write; then one that rank 0 cannot finish."""
    run, engine = make_run("sft_ag")
    run.train_step(1)
    save(engine, Path(folder), 1)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    messages = []
    for rank_with_limit in (1, 0):
        write = CheckpointWrite(Path(folder) / "checkpoint-2", 2)
        slices = engine.slices(2)
        try:
            if rank_with_limit == 1 == rank():
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, unlimited[1]))
            try:
                sha256, problem = write.write(slices), ""
            except UserError as error:
                sha256, problem = "", str(error)
            problems = gather(problem)
            if any(problems):
                messages += [problem for problem in problems if problem]
                write.abandon()
                continue
            if rank_with_limit == 0 == rank():
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, unlimited[1]))
            hashes = gather(sha256)
            write.publish(hashes, {item.name: item.entry for item in slices}, IndexContent({}, {}, "x" * 1000))
        except UserError as error:
            messages.append(str(error))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    gather(None)
    checkpoint = find_checkpoint(Path(folder), "auto")
    assert checkpoint is not None
    return checkpoint.folder.name, messages, sorted(path.name for path in Path(folder).iterdir())


def test_a_rank_that_cannot_write_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    for newest, messages, left in run_ranks(2, save_with_one_full_disk, str(tmp_path / "run")):
        assert newest == "checkpoint-1" and left == ["checkpoint-1"]
        assert len(messages) == 2
        for message in messages:
            assert "checkpoint-2 cannot be written (File too large). Older checkpoints are untouched." in message


def begin_where_nothing_can_be_written(folder: str) -> str:
    try:
        CheckpointWrite(Path(folder) / "file" / "checkpoint-1", 1)
    except UserError as error:
        return str(error)
    return ""


def test_a_folder_that_cannot_be_made_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for message in run_ranks(2, begin_where_nothing_can_be_written, str(tmp_path)):
        assert "checkpoint-1 cannot be written (" in message
