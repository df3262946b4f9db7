"""A NaN in the gradient: the step is skipped on all ranks alike, counted, and named by its rows.

The NaN is real: one row of the data holds a token whose embedding is so large that the backward pass of the first norm
overflows. The loss itself stays finite; a loss that is not is given by the processes of the run (`lose_step`).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fault_run import (
    ADAPTER,
    ARGUMENTS,
    NUM_STEPS,
    RESUME,
    assert_same_run,
    carry_out,
    has_done,
    kill,
    start_run,
    wait_until,
)
from finished_runs import FinishedRun
from forks import start_in_forks, wait_for
from safetensors.torch import load_file, save_file
from short_run import set_words
from test_lost_ranks import at_step_on_rank
from transformers import AutoTokenizer

from sparse_ds.config.errors import NON_FINITE_EXIT_CODE

BAD_ROW = 30
RARE = "\x05"
"""A text of one token that no other row holds."""


def spoil(work: Path, row: int | None = BAD_ROW) -> None:
    """Put the rare token into one row, or into all of them, and make its embedding huge."""
    rows = [json.loads(line) for line in (work / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    for number, content in enumerate(rows):
        if row is None or number == row:
            content["output"] += RARE
    (work / "rows.jsonl").write_text("".join(json.dumps(content) + "\n" for content in rows), encoding="utf-8")
    token = AutoTokenizer.from_pretrained(work / "model")(RARE)["input_ids"][-1]
    tensors = load_file(work / "model" / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = 3e38
    save_file(tensors, work / "model" / "model.safetensors", metadata={"format": "pt"})


METHODS = {
    "sft_ma": [],
    "sft_ag": ["--config", "zero3_sft_ag"],
    "sft_ag, step": ["--config", "zero3_sft_ag", *set_words(["method.candidate_source=step"])],
}


@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_skipped(method: str, work: Path) -> None:
    """Wherever the step falls: in an estimation phase, before an event, at the run's end."""
    spoil(work)
    run, ended = carry_out(work, *METHODS[method])
    skipped = run.of_kind("skipped")
    assert 1 <= len(skipped) <= 2, "the row is in one step of each epoch"
    for number, record in enumerate(skipped, start=1):
        assert BAD_ROW in record["rows"] and len(record["rows"]) == 8
        assert (record["num_in_a_row"], record["num_skipped"]) == (1, number)
        assert f"step {record['step']} is skipped on all ranks: its loss or gradient is not finite" in ended[0].stdout
    steps = {record["step"] for record in skipped}
    norms = run.by_step("step", "grad_norm")
    assert {step for step, norm in norms.items() if norm is None} == steps, "and only they"
    assert all(loss is not None for loss in run.losses.values())
    assert run.summary["num_skipped_steps"] == len(skipped)
    assert f"{NUM_STEPS} steps ({len(skipped)} skipped)" in ended[0].stdout
    assert all(bool(torch.isfinite(tensor.float()).all()) for tensor in run.adapter.values())
    assert run.summary["heldout_loss_after"] < run.summary["heldout_loss_before"]


def test_a_method_that_selects_once(work: Path) -> None:
    """The step is among those that measure, before anything trains."""
    spoil(work)
    place = ARGUMENTS.index("method.interval_steps=3")
    words = [*ARGUMENTS[: place - 1], *ARGUMENTS[place + 1 :], "--config", "zero3_sft_ag"]
    words += set_words(["method.name=accumulated_gradient", "method.estimation_steps=6"])
    ended = wait_for(start_in_forks([words] * 2, [work] * 2))
    assert [rank.exit_code for rank in ended] == [0, 0], ended
    run = FinishedRun.read(work / "run")
    assert run.of_kind("skipped")[0]["step"] <= 6 and tuple(run.index_hashes) == (6,)
    assert all(bool(torch.isfinite(tensor.float()).all()) for tensor in run.adapter.values())
    assert run.summary["heldout_loss_after"] < run.summary["heldout_loss_before"]


def test_a_skipped_step_changes_nothing(work: Path) -> None:
    """The weights after it are those before it, and the count of skipped steps is part of a checkpoint."""
    spoil(work)
    whole, _ = carry_out(work)
    (first, *_) = [record["step"] for record in whole.of_kind("skipped")]
    lengths = {f"to_{steps}": steps for steps in (first - 1, first)}
    for output, steps in lengths.items():
        # The schedules are those of the whole run: it is killed, not shortened.
        words = set_words([f"train.output_dir={output}", "checkpoint.interval_steps=1"])
        ranks = start_run(work, *words)
        wait_until(lambda output=output, steps=steps: (work / output / f"checkpoint-{steps}").exists(), ranks)  # type: ignore[misc]
        kill(ranks)
    before, after = (values_of(work / output / f"checkpoint-{steps}") for output, steps in lengths.items())
    assert before.keys() == after.keys() and before
    assert all(torch.equal(before[name], after[name]) for name in before)
    resumed, _ = carry_out(
        work, *set_words([f"train.output_dir=to_{first}", "checkpoint.interval_steps=1"]), *RESUME, output=f"to_{first}"
    )
    assert resumed.of_kind("skipped") == whole.of_kind("skipped")
    assert_same_run(resumed, whole)


def values_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        tensors |= {f"{path.name} {name}": tensor for name, tensor in load_file(path).items()}
    return tensors


def test_too_many_in_a_row(work: Path) -> None:
    spoil(work, row=None)
    ranks = start_run(work, *set_words(["train.max_skipped_steps=3"]))
    ended = wait_for(ranks)
    assert [rank.exit_code for rank in ended] == [NON_FINITE_EXIT_CODE] * 2, ended
    records = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    skipped = [record for record in records if record["kind"] == "skipped"]
    assert [record["num_in_a_row"] for record in skipped] == [1, 2, 3]
    rows = ", ".join(map(str, skipped[-1]["rows"]))
    assert ended[0].stderr.startswith(
        "error: train.max_skipped_steps: the loss or gradient of 3 steps in a row was not finite, the last of them "
        f"step 3 with rows {rows} of the training data (counted from 0)."
    )
    assert "Traceback" not in ended[0].stderr and ended[1].stderr == ""


def lose_step() -> None:
    """The loss of step 4 is infinite on rank 1, its gradient finite."""
    from sparse_ds.training import trainer as module

    original = module.with_gradient_of_its_kind

    def plus_infinity() -> None:
        module.with_gradient_of_its_kind = lambda loss: original(loss + torch.inf)

    def again() -> None:
        module.with_gradient_of_its_kind = original

    at_step_on_rank(4, 1, plus_infinity)
    at_step_on_rank(5, 1, again)


def test_an_infinite_loss_with_a_finite_gradient(work: Path) -> None:
    ranks = start_run(work, prepare=lose_step)
    assert [rank.exit_code for rank in wait_for(ranks)] == [0, 0]
    run = FinishedRun.read(work / "run")
    (record,) = run.of_kind("skipped")
    assert record["step"] == 4
    assert {step for step, loss in run.losses.items() if loss is None} == {4}, "and the losses after it are shown again"
    assert (work / "run" / ADAPTER).exists() and has_done(work, NUM_STEPS)
