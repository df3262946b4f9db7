"""Going on from a checkpoint: the same run as if nothing had happened.

The run that is gone on from (`checkpointed_run`) has 6 steps an epoch and events after steps 2, 7 and 12. Step 8 is in
the middle of an epoch and just after an event; step 12 is the end of an epoch and itself a step with an event.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from finished_runs import FinishedRun, index_overlap
from forks import Ended, train_in_forks
from launches import TRAIN, launch
from short_run import NUM_STEPS, RUN_ARGUMENTS, set_words

from sparse_ds.embedded import resolve_model
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


def test_its_speed_is_a_share_of_the_peak(checkpointed_run: FinishedRun) -> None:
    """Two ranks; forward and input gradient of the linear layers take 4 operations a weight and token."""
    steps = read_metrics(checkpointed_run.folder / "metrics.jsonl", "step")
    for record in [*steps, checkpointed_run.summary]:
        assert record["mfu"] == record["hfu"] == pytest.approx(record["tflops_per_rank"] / 0.05)
        flops_per_token = 2e12 * record["tflops_per_rank"] / record["tokens_per_second"]
        assert 3.6 < flops_per_token / checkpointed_run.summary["num_weights"] < 4.8
    total = sum(record["num_tokens"] for record in steps)
    summary = checkpointed_run.summary
    assert summary["tokens_per_second"] * summary["wall_s"] == pytest.approx(total)


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


def run_and_go_on(work: Path, step: int, *settings: str, then: tuple[str, ...] = ()) -> tuple[FinishedRun, FinishedRun]:
    """A run of SFT-AG or as `settings` say, and the same run gone on from one of its checkpoints in another folder,
    with the settings `then` besides."""
    kept = [word for word in RUN_ARGUMENTS if word.startswith(("data.", "train.", "monitor."))]
    lengths = ("train.max_steps=8", "checkpoint.interval_steps=2", "checkpoint.keep=5", "export.merged=false")
    arguments = ["--config", "zero3_sft_ag", *set_words([*kept, *lengths, *settings, "train.output_dir=first"])]
    assert [rank.exit_code for rank in train_in_forks([arguments] * 2, [work] * 2)] == [0, 0]
    again = [*arguments, *set_words(["train.output_dir=again", *then]), "--resume", f"first/checkpoint-{step}"]
    assert [rank.exit_code for rank in train_in_forks([again] * 2, [work] * 2)] == [0, 0]
    return FinishedRun.read(work / "first"), FinishedRun.read(work / "again")


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("storage", "then"), [("compact", "int32"), pytest.param("int32", "compact", marks=pytest.mark.slow)]
)
def test_the_storage_of_indices_is_no_part_of_a_run(work: Path, storage: str, then: str) -> None:
    """SFT-AG in the middle of an estimation phase."""
    events = ("method.interval_steps=5", "method.estimation_steps=2")
    settings = [f"method.index_storage={each}" for each in (storage, then)]
    first, again = run_and_go_on(work, 6, *events, settings[0], then=(settings[1],))
    assert tuple(first.index_hashes) == (2, 7) and again.index_hashes == after(6, first.index_hashes)
    assert [run.config["method"]["index_storage"] for run in (first, again)] == [storage, then]
    assert again.losses == after(6, first.losses)
    assert (again.folder / ADAPTER).read_bytes() == (first.folder / ADAPTER).read_bytes()
    for state in ("state-00001-of-00002.safetensors", "state-00002-of-00002.safetensors"):
        path = Path("checkpoint-8") / state
        assert (again.folder / path).read_bytes() == (first.folder / path).read_bytes()


@pytest.mark.slow
def test_after_the_one_event_of_fisher(work: Path) -> None:
    """Before it nothing has been trained, and no checkpoint is written."""
    first, again = run_and_go_on(work, 4, "method.name=fisher", "method.estimation_steps=3")
    assert tuple(first.index_hashes) == (3,) and not again.index_hashes
    assert {path.name for path in first.folder.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (4, 6, 8)}
    assert again.losses == after(4, first.losses)
    assert (again.folder / ADAPTER).read_bytes() == (first.folder / ADAPTER).read_bytes()


@pytest.mark.slow
def test_all_that_a_step_and_a_log_line_depend_on(work: Path) -> None:
    """Dropout draws from the random generators; a log line sums up three steps, and a checkpoint is among them.

    Written in the background, at a step after which the run evaluates.
    """
    model = Path(shutil.copytree(resolve_model("embedded"), work / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.3}))
    settings = [
        "model.name_or_path=model",
        "monitor.log_interval_steps=3",
        "checkpoint.background=true",
        "train.eval_interval_steps=2",
    ]
    for step in (4, 6):
        first, again = run_and_go_on(work, step, "method.interval_steps=7", "method.estimation_steps=2", *settings)
        assert set(first.losses) == {3, 6}
        for field in ("loss", "grad_norm", "lr", "num_tokens", "epoch"):
            assert again.by_step("step", field) == after(step, first.by_step("step", field)), field
        assert again.by_step("eval", "loss") == after(step, first.by_step("eval", "loss"))
        assert (again.folder / ADAPTER).read_bytes() == (first.folder / ADAPTER).read_bytes()
        for folder in (first.folder, again.folder):
            assert not list(folder.glob(".*")), "something hidden was left"
        for run in ("first", "again"):
            shutil.rmtree(work / run)
    without, _ = run_and_go_on(
        work, 4, "method.interval_steps=7", "method.estimation_steps=2", "monitor.log_interval_steps=3"
    )
    assert without.losses[3] != first.losses[3], "dropout must have an effect"


def test_in_the_background_the_same_is_written(work: Path, checkpointed_run: FinishedRun) -> None:
    arguments = [*RUN_ARGUMENTS, *set_words(["checkpoint.background=true", "train.output_dir=background"])]
    assert [rank.exit_code for rank in train_in_forks([arguments] * 2, [work] * 2)] == [0, 0]
    folder = work / "background"
    assert {path.name for path in folder.glob("checkpoint-*")} == {
        path.name for path in checkpointed_run.folder.glob("checkpoint-*")
    }
    for path in checkpointed_run.folder.glob("checkpoint-*/state-*"):
        name = path.relative_to(checkpointed_run.folder)
        assert (folder / name).read_bytes() == path.read_bytes()
        left, right = (
            json.loads((run / name.parent / "checkpoint.json").read_text()) for run in (folder, path.parents[1])
        )
        for content in (left, right):
            # What tells the time, or is a hash of it.
            del content["sha256"], content["files"]["trainer_state.json"]
            del content["run_state"]["trainer"]["callbacks"]["WriteMetrics"]["train_wall_s"]
        assert left == right


@pytest.mark.slow
def test_the_best_checkpoint_stays(work: Path) -> None:
    """With a far too high learning rate the held-out loss falls for some steps and then rises."""
    settings = [
        "checkpoint.best=true",
        "checkpoint.keep=1",
        "checkpoint.interval_steps=1",
        "train.eval_interval_steps=1",
        "train.max_steps=6",
        "optimizer.learning_rate=0.03",
        "optimizer.schedule=constant",
        "train.output_dir=best",
    ]
    arguments = [*RUN_ARGUMENTS, *set_words(settings)]
    (rank,) = train_in_forks([arguments], [work])
    assert rank.exit_code == 0, rank
    run = FinishedRun.read(work / "best")
    losses = {step: loss for step, loss in run.by_step("eval", "loss").items() if step > 0}
    best = min(losses, key=lambda step: losses[step])
    assert 1 < best < 6, losses
    assert {path.name for path in run.folder.glob("checkpoint-*")} == {f"checkpoint-{best}", "checkpoint-6"}
    for step in (best, 6):
        index = json.loads((run.folder / f"checkpoint-{step}" / "checkpoint.json").read_text())
        assert index["run_state"]["best"] == {"step": best, "heldout_loss": losses[best]}
    expected = f"lowest held-out loss of all checkpoints: {losses[best]:.4f}, best/checkpoint-{best}"
    assert expected in rank.stdout
    # Going on, the best stays the best; and it becomes an adapter by finishing a run that ends there.
    longer = [*arguments, *set_words(["train.max_steps=7", "optimizer.learning_rate=1.0"]), "--resume", "auto"]
    assert train_in_forks([longer], [work])[0].exit_code == 0
    longer_run = FinishedRun.read(work / "best")
    assert longer_run.by_step("eval", "loss")[7] > losses[best] and longer_run.by_step("step", "lr")[7] == 1.0
    assert {path.name for path in run.folder.glob("checkpoint-*")} == {f"checkpoint-{best}", "checkpoint-7"}
    ending = set_words([f"train.max_steps={best}", "train.output_dir=chosen"])
    chosen = [*arguments, *ending, "--resume", f"best/checkpoint-{best}"]
    assert train_in_forks([chosen], [work])[0].exit_code == 0
    assert FinishedRun.read(work / "chosen").summary["heldout_loss_after"] == losses[best]


def test_auto_begins_where_there_is_no_checkpoint_yet(work: Path, checkpointed_run: FinishedRun) -> None:
    """The first start of a job, and one after a kill before the first checkpoint: the same command."""
    arguments = [
        *RUN_ARGUMENTS,
        *set_words(["train.output_dir=new", "checkpoint.interval_steps=20"]),
        "--resume",
        "auto",
    ]
    for start in range(2):
        ranks = train_in_forks([arguments] * 2, [work] * 2)
        assert [rank.exit_code for rank in ranks] == [0, 0], ranks
        assert "no checkpoint in new yet: the run begins from its first step" in ranks[0].stdout
        run = FinishedRun.read(work / "new")
        assert [record["step"] for record in run.of_kind("step")] == list(range(1, NUM_STEPS + 1))
        assert run.losses == checkpointed_run.losses and len(run.of_kind("eval")) == 2
        assert (run.folder / ADAPTER).read_bytes() == (checkpointed_run.folder / ADAPTER).read_bytes()
        if start == 0:
            shutil.rmtree(work / "new" / "adapter")
            shutil.rmtree(work / "new" / "checkpoint-14")


@pytest.mark.parametrize("num_ranks", [2, 1])
def test_a_run_that_ended_before_its_adapter_is_finished(
    work: Path, checkpointed_run: FinishedRun, num_ranks: int
) -> None:
    shutil.rmtree(work / "run" / "adapter")
    metrics = work / "run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    assert '"summary"' in lines[-1] and '"eval"' in lines[-2]
    metrics.write_text("".join(lines[:-2]))
    resumed, _ = go_on(work, "auto", "export.merged=true", num_ranks=num_ranks)
    assert (resumed.folder / ADAPTER).read_bytes() == (checkpointed_run.folder / ADAPTER).read_bytes()
    assert (resumed.folder / "merged" / "model.safetensors").is_file()
    assert resumed.losses == checkpointed_run.losses and len(resumed.of_kind("eval")) == 2
    for field in ("heldout_loss_before", "index_hash", "num_steps"):
        assert resumed.summary[field] == checkpointed_run.summary[field]
    # On another number of ranks a sum in another order.
    expected = pytest.approx(checkpointed_run.summary["heldout_loss_after"], rel=0 if num_ranks == 2 else 1e-6, abs=0)
    assert resumed.summary["heldout_loss_after"] == expected


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "background"), [("stop", "false"), ("continue", "false"), ("continue", "true")])
def test_checkpoints_that_cannot_be_written(
    work: Path, checkpointed_run: FinishedRun, policy: str, background: str
) -> None:
    """No file may be larger than the adapter, and the state of a checkpoint is."""
    adapter_bytes = (checkpointed_run.folder / ADAPTER).stat().st_size
    settings = [
        f"checkpoint.on_save_error={policy}",
        f"checkpoint.background={background}",
        "train.output_dir=full",
        "train.max_steps=5",
    ]
    words = shlex.join([sys.executable, str(TRAIN), *RUN_ARGUMENTS, *set_words(settings)])
    ended = launch(["bash", "-c", f"ulimit -f {adapter_bytes // 1024 + 1}; exec {words}"], work)
    message = "checkpoint of step 2: full/checkpoint-2 cannot be written (File too large). Older checkpoints"
    assert not list((work / "full").glob("*checkpoint-*")) and not list((work / "full").glob(".checkpoint-*"))
    steps = [record["step"] for record in read_metrics(work / "full" / "metrics.jsonl", "step")]
    if policy == "stop":
        assert ended.exit_code == 2 and f"error: {message}" in ended.stderr and "Traceback" not in ended.stderr, ended
        assert steps == [1, 2]
    else:
        assert ended.exit_code == 0 and f"sparse_ds: {message}" in ended.stdout, ended
        assert "3 checkpoint(s) could not be written" in ended.stdout
        assert steps == [1, 2, 3, 4, 5] and (work / "full" / ADAPTER).is_file()


@pytest.mark.slow
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
