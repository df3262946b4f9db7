"""What does not divide by the ranks, and what ends early: decided once for all ranks, so that none is waited for."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from fault_run import RESUME, assert_same_run, carry_out, has_done, start_run, wait_until
from forks import wait_for
from short_run import save_rows, set_words

from sparse_ds.config.errors import STOPPED_EXIT_CODE


def test_nothing_divides(work: Path) -> None:
    """3 ranks, 37 rows in steps of 12, 7 held-out rows in batches of 2: one rank has two of the 4, the others one."""
    save_rows(work, 37)
    words = ["data.num_eval_samples=7", "train.global_batch_size=12", "train.eval_micro_batch_size=2"]
    words += ["train.max_steps=null", "train.num_epochs=2.5", "train.eval_interval_steps=2"]
    run, _ = carry_out(work, *set_words(words), num_ranks=3)
    # 3 steps an epoch; the row that is left over waits for another epoch.
    assert list(run.losses) == list(range(1, 9))
    assert list(run.by_step("eval", "loss")) == [0, 2, 4, 6, 8]
    alone, _ = carry_out(work, *set_words([*words, "train.output_dir=alone"]), num_ranks=1, output="alone")
    assert run.by_step("step", "num_tokens") == alone.by_step("step", "num_tokens")
    assert run.by_step("eval", "num_tokens") == alone.by_step("eval", "num_tokens")


EARLY = set_words(
    # A rate at which the held-out loss rises after the first steps.
    [
        "optimizer.learning_rate=0.5",
        "train.eval_interval_steps=1",
        "train.early_stopping_patience=3",
        "train.max_steps=20",
    ]
)


def test_early_stopping(work: Path) -> None:
    """All ranks leave after the same evaluation; a run that was stopped in between counts on."""
    whole, ended = carry_out(work, *EARLY)
    losses = whole.by_step("eval", "loss")
    best = min(losses, key=losses.__getitem__)
    assert list(losses) == list(range(best + 4)) and best + 3 < 20
    assert f"has not fallen below {losses[best]:.4f} in 3 evaluations: the training ends after step {best + 3}" in (
        ended[0].stdout
    )
    assert whole.summary["num_steps"] == best + 3
    assert whole.summary["heldout_loss_after"] == losses[best + 3]
    other = [*EARLY, *set_words(["train.output_dir=again"])]
    ranks = start_run(work, *other)
    wait_until(lambda: has_done(work, best + 1, "again"), ranks)
    os.kill(ranks[1].pid, signal.SIGTERM)
    assert [rank.exit_code for rank in wait_for(ranks)] == [STOPPED_EXIT_CODE] * 2
    resumed, _ = carry_out(work, *other, *RESUME, output="again")
    assert_same_run(resumed, whole)
