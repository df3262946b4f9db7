"""Going on from a checkpoint: the same run as if nothing had happened.

The run that is gone on from (`checkpointed_run`) has 6 steps an epoch and events after steps 2, 7 and 12. Step 8 is in
the middle of an epoch and just after an event; step 12 is the end of an epoch and itself a step with an event.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from finished_runs import FinishedRun, index_overlap
from forks import Ended, train_in_forks
from short_run import NUM_STEPS, RUN_ARGUMENTS, set_words

from sparse_ds.monitor.metrics_log import read_metrics

ADAPTER = Path("adapter") / "adapter_model.safetensors"


@pytest.fixture
def work(tmp_path: Path, checkpointed_run: FinishedRun) -> Path:
    """A copy of the working folder of the run."""
    return Path(shutil.copytree(checkpointed_run.folder.parent, tmp_path / "work"))


def go_on(work: Path, resume: str, *settings: str, num_ranks: int = 2) -> tuple[FinishedRun, list[Ended]]:
    arguments = [*RUN_ARGUMENTS, *set_words(settings), "--resume", resume]
    output = next((s.removeprefix("train.output_dir=") for s in settings if s.startswith("train.output_dir=")), "run")
    ranks = train_in_forks([arguments] * num_ranks, [work] * num_ranks)
    assert [rank.exit_code for rank in ranks] == [0] * num_ranks, ranks
    return FinishedRun.read(work / output), ranks


def after(step: int, by_step: dict[int, object]) -> dict[int, object]:
    return {at: value for at, value in by_step.items() if at > step}


def test_the_run_itself(checkpointed_run: FinishedRun) -> None:
    """What the tests below rest on: events, whole epochs, checkpoints."""
    assert tuple(checkpointed_run.index_hashes) == (2, 7, 12)
    assert len(set(checkpointed_run.index_hashes.values())) == 3
    assert list(checkpointed_run.losses) == list(range(1, NUM_STEPS + 1))
    epochs = checkpointed_run.by_step("step", "epoch")
    assert (epochs[6], epochs[12]) == (1.0, 2.0)
    checkpoints = {path.name for path in checkpointed_run.folder.glob("checkpoint-*")}
    assert checkpoints == {f"checkpoint-{step}" for step in (6, 8, 10, 12, 14)}


def test_a_new_folder_from_the_middle_of_an_epoch(work: Path, checkpointed_run: FinishedRun) -> None:
    before = {path.name for path in (work / "run").iterdir()}
    resumed, ranks = go_on(work, "run/checkpoint-8", "train.output_dir=resumed")
    assert "sparse_ds: going on from run/checkpoint-8 (step 8)" in ranks[0].stdout
    for kind, field in (
        ("step", "loss"),
        ("step", "grad_norm"),
        ("step", "lr"),
        ("step", "epoch"),
        ("step", "num_tokens"),
        ("event", "index_hash"),
        ("event", "dropped"),
        ("eval", "loss"),
    ):
        expected = after(8, checkpointed_run.by_step(kind, field))
        assert expected and resumed.by_step(kind, field) == expected, (kind, field)
    assert (resumed.folder / ADAPTER).read_bytes() == (checkpointed_run.folder / ADAPTER).read_bytes()
    left, right = resumed.summary, checkpointed_run.summary
    for field in ("heldout_loss_before", "heldout_loss_after", "index_hash", "num_steps", "num_trained_weights"):
        assert left[field] == right[field], field
    assert {path.name for path in (work / "run").iterdir()} == before


def test_another_number_of_ranks(work: Path, checkpointed_run: FinishedRun) -> None:
    resumed, _ = go_on(work, "run/checkpoint-6", "train.output_dir=resumed", num_ranks=1)
    expected = after(6, checkpointed_run.losses)
    assert resumed.losses.keys() == expected.keys()
    # bf16 sums in another order.
    assert max(abs(resumed.losses[step] - expected[step]) for step in expected) < 1e-2
    assert resumed.by_step("step", "num_tokens") == after(6, checkpointed_run.by_step("step", "num_tokens"))
    assert resumed.by_step("event", "dropped") == after(6, checkpointed_run.by_step("event", "dropped"))
    assert index_overlap(resumed, checkpointed_run) >= 0.99


def test_auto_passes_over_a_damaged_checkpoint(work: Path, checkpointed_run: FinishedRun) -> None:
    """In the same folder: what the run wrote after the checkpoint is written again."""
    (work / "run" / "checkpoint-14" / "checkpoint.json").unlink()
    resumed, ranks = go_on(work, "auto")
    passed_over = [line for line in ranks[0].stdout.splitlines() if "passed over" in line]
    assert len(passed_over) == 1 and "run/checkpoint-14: has no readable checkpoint.json" in passed_over[0], ranks[0]
    assert "sparse_ds: going on from run/checkpoint-12 (step 12)" in ranks[0].stdout
    assert "passed over" not in ranks[1].stdout + ranks[1].stderr
    assert resumed.losses == checkpointed_run.losses
    assert [record["step"] for record in resumed.of_kind("step")] == list(range(1, NUM_STEPS + 1))
    assert resumed.index_hashes == checkpointed_run.index_hashes
    assert (resumed.folder / ADAPTER).read_bytes() == (checkpointed_run.folder / ADAPTER).read_bytes()
    assert resumed.summary["heldout_loss_after"] == checkpointed_run.summary["heldout_loss_after"]
    for state in ("state-00001-of-00002.safetensors", "state-00002-of-00002.safetensors"):
        path = Path("checkpoint-14") / state
        assert (work / "run" / path).read_bytes() == (checkpointed_run.folder / path).read_bytes()


def run_and_go_on(work: Path, step: int, *settings: str) -> tuple[FinishedRun, FinishedRun]:
    """A run of SFT-AG or as `settings` say, and the same run gone on from one of its checkpoints in another folder."""
    kept = [word for word in RUN_ARGUMENTS if word.startswith(("data.", "train.", "monitor."))]
    lengths = ("train.max_steps=8", "checkpoint.interval_steps=2", "checkpoint.keep=5", "export.merged=false")
    arguments = ["--config", "zero3_sft_ag", *set_words([*kept, *lengths, *settings, "train.output_dir=first"])]
    assert [rank.exit_code for rank in train_in_forks([arguments] * 2, [work] * 2)] == [0, 0]
    again = [*arguments, *set_words(["train.output_dir=again"]), "--resume", f"first/checkpoint-{step}"]
    assert [rank.exit_code for rank in train_in_forks([again] * 2, [work] * 2)] == [0, 0]
    return FinishedRun.read(work / "first"), FinishedRun.read(work / "again")


@pytest.mark.parametrize(
    "settings",
    [
        ["optimizer.moments=float32"],
        [
            "optimizer.moments=int8",
            "method.candidate_source=step",
            "method.drop_criterion=change",
            "method.redistribution_factor=1.5",
        ],
    ],
    ids=["plain", "step, change, redistribution, int8"],
)
def test_the_middle_of_an_estimation_phase(work: Path, settings: list[str]) -> None:
    """SFT-AG after the first of the two steps before the event of step 7: candidates, their sums, ages and moments."""
    first, again = run_and_go_on(work, 6, "method.interval_steps=5", "method.estimation_steps=2", *settings)
    assert tuple(first.index_hashes) == (2, 7) and again.index_hashes == after(6, first.index_hashes)
    assert first.by_step("event", "dropped")[7] > 0
    assert again.losses == after(6, first.losses)
    assert (again.folder / ADAPTER).read_bytes() == (first.folder / ADAPTER).read_bytes()


def test_after_the_one_event_of_fisher(work: Path) -> None:
    """Before it nothing has been trained, and no checkpoint is written."""
    first, again = run_and_go_on(work, 4, "method.name=fisher", "method.estimation_steps=3")
    assert tuple(first.index_hashes) == (3,) and not again.index_hashes
    assert {path.name for path in first.folder.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (4, 6, 8)}
    assert again.losses == after(4, first.losses)
    assert (again.folder / ADAPTER).read_bytes() == (first.folder / ADAPTER).read_bytes()


def test_full_fine_tuning(work: Path) -> None:
    """AdamW's moments and the weights themselves; the dense model at the end is the same to the byte."""
    settings = ["train.max_steps=6", "checkpoint.interval_steps=4", "export.merged=true", "train.output_dir=full"]
    kept = [word for word in RUN_ARGUMENTS if word.startswith(("data.", "train.", "monitor."))]
    arguments = ["--config", "zero3_full", *set_words([*kept, *settings])]
    assert [rank.exit_code for rank in train_in_forks([arguments] * 2, [work] * 2)] == [0, 0]
    again = [*arguments, *set_words(["train.output_dir=again"]), "--resume", "full/checkpoint-4"]
    assert [rank.exit_code for rank in train_in_forks([again] * 2, [work] * 2)] == [0, 0]
    first, second = (read_metrics(work / name / "metrics.jsonl", "step") for name in ("full", "again"))
    assert [record["loss"] for record in second] == [record["loss"] for record in first[4:]]
    merged = Path("merged") / "model.safetensors"
    assert (work / "again" / merged).read_bytes() == (work / "full" / merged).read_bytes()
