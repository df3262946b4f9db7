"""A rank that is stopped, hangs or fails: the others end in time, with one message that says which, where and why."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_run import STALL_TIMEOUT_S, assert_same_run, carry_out, go_on, has_done, start_run, wait_until
from finished_runs import FinishedRun
from forks import Ended, Rank, wait_for
from short_run import set_words

from sparse_ds.config.errors import LOST_RANK_EXIT_CODE

SECONDS_MORE = 10.0
"""Than the time limit: to look, to tell the others and to end, on a machine with few cores."""
POSITION = r"in step \d+, collective \d+ \(gloo:\w+[^)]*\)"


def message_of(ended: Ended, rank: int) -> str:
    """The one line by which a rank explains its end."""
    assert ended.exit_code == LOST_RANK_EXIT_CODE, ended
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error")]
    match = re.fullmatch(
        rf"error \(rank {rank}\): the run ends because (.*)\. It was last heard of {POSITION}\. "
        rf"This rank is {POSITION}\. Go on with `--resume auto` once the cause is removed\.",
        line,
    )
    assert match is not None, line
    # Neither a traceback of a collective nor a word of the transport.
    assert "Traceback" not in ended.stderr and "onnection reset" not in ended.stderr
    return match[1]


def end_of_others(ranks: list[Rank], lost: int) -> dict[int, str]:
    """Rank -> its message, for all ranks but one; they end within the time limit."""
    begin = time.monotonic()
    others = [rank for rank in range(len(ranks)) if rank != lost]
    ended = wait_for([ranks[rank] for rank in others], STALL_TIMEOUT_S + SECONDS_MORE)
    assert time.monotonic() - begin < STALL_TIMEOUT_S + SECONDS_MORE
    return {rank: message_of(one, rank) for rank, one in zip(others, ended, strict=True)}


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_stopped_rank(lost: int, work: Path) -> None:
    ranks = start_run(work, *set_words(["train.global_batch_size=12"]), num_ranks=3)
    wait_until(lambda: has_done(work, 3), ranks)
    os.kill(ranks[lost].pid, signal.SIGSTOP)
    try:
        for message in end_of_others(ranks, lost).values():
            assert re.fullmatch(
                rf"rank {lost} \(pid {ranks[lost].pid} on [^)]+\) has not been heard of for \d+ s "
                r"\(train.stall_timeout_s 5\): its process is stopped, or its machine is off or cut off from the "
                r"others",
                message,
            )
    finally:
        ranks[lost].process.kill()


def test_all_ranks_stopped_for_a_while_go_on(work: Path, undisturbed: FinishedRun) -> None:
    """A suspended job, or a machine that slept: nobody was missing."""
    ranks = start_run(work)
    wait_until(lambda: has_done(work, 3), ranks)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGSTOP)
    time.sleep(2 * STALL_TIMEOUT_S)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGCONT)
    assert [rank.exit_code for rank in wait_for(ranks)] == [0, 0]
    assert_same_run(FinishedRun.read(work / "run"), undisturbed)


def at_step_on_rank(step: int, rank: int, action: Callable[[], None]) -> None:
    """In the processes of a run: do something on one rank before a step's forward pass."""
    if os.environ["RANK"] != str(rank):
        return
    from sparse_ds.training.trainer import SparseTrainer

    training_step = SparseTrainer.training_step

    def disturbed(self: SparseTrainer, *args: object, **kwargs: object) -> object:
        if self.state.global_step == step - 1:
            action()
        return training_step(self, *args, **kwargs)  # type: ignore[arg-type]

    SparseTrainer.training_step = disturbed  # type: ignore[method-assign,assignment]


def hang_on_rank_1() -> None:
    """As on a file system that does not answer: the process lives, its main thread waits."""
    at_step_on_rank(5, 1, lambda: time.sleep(600))


def test_a_rank_that_hangs_while_its_process_lives(work: Path) -> None:
    ranks = start_run(work, prepare=hang_on_rank_1)
    wait_until(lambda: has_done(work, 4), ranks)
    ended = wait_for(ranks, STALL_TIMEOUT_S + SECONDS_MORE)
    for rank in range(2):
        message = message_of(ended[rank], rank)
        assert message.startswith(f"rank 1 (pid {ranks[1].pid} on ")
        assert re.search(
            r"is alive but has begun no collective for \d+ s \(train.stall_timeout_s 5\), and the others wait in "
            r"collective \d+: it waits for something else",
            message,
        )


def run_out_of_memory() -> None:
    raise MemoryError("no room for 3 GiB")


def fail_on_rank_0() -> None:
    at_step_on_rank(5, 0, run_out_of_memory)


def fail_on_rank_1() -> None:
    at_step_on_rank(5, 1, run_out_of_memory)


@pytest.mark.parametrize(("lost", "prepare"), [(0, fail_on_rank_0), (1, fail_on_rank_1)])
def test_a_rank_that_fails(lost: int, prepare: Callable[[], None], work: Path, undisturbed: FinishedRun) -> None:
    """It has the traceback, the other its name and error; then the run goes on from its checkpoint."""
    ranks = start_run(work, prepare=prepare)
    ended = wait_for(ranks)
    assert ended[lost].exit_code == 1
    assert ended[lost].stderr.count("Traceback") == 1 and "MemoryError: no room for 3 GiB" in ended[lost].stderr
    message = message_of(ended[1 - lost], 1 - lost)
    assert message.startswith(f"rank {lost} (pid {ranks[lost].pid} on ")
    assert message.endswith("failed: MemoryError: no room for 3 GiB")
    resumed, _ = go_on(work)
    assert_same_run(resumed, undisturbed)


def test_nobody_is_missed_at_the_end(work: Path) -> None:
    """Rank 0 alone merges the model, for as long as it takes: the others have left in good order."""
    words = set_words(["export.merged=true", "train.max_steps=2"])
    _, ended = carry_out(work, *words)
    assert (work / "run" / "merged" / "model.safetensors").exists()
    assert not any("error" in rank.stderr for rank in ended)
