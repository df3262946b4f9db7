"""Asked to stop: all ranks finish the step, save, and end with 75; the run goes on as if it had never stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from fault_run import ARGUMENTS, RESUME, assert_same_run, carry_out, has_done, start_run, wait_until
from finished_runs import FinishedRun
from forks import Ended, free_port, wait_for
from launches import PROGRAMS, ROOT, TRAIN, start
from short_run import set_words

from sparse_ds.config.errors import STOPPED_EXIT_CODE
from sparse_ds.training.stop_signals import SECOND_SIGNAL_AFTER_S

ACCELERATE_CPU = ROOT / "configs" / "accelerate" / "cpu.yaml"
STOPPED = re.compile(r"^sparse_ds: stopped by .+ after step (\d+); go on with `--resume auto`$", re.MULTILINE)


def step_of_stop(ended: list[Ended]) -> int:
    """After which all ranks have stopped, as rank 0 says once."""
    assert [rank.exit_code for rank in ended] == [STOPPED_EXIT_CODE] * len(ended), ended
    (step,) = STOPPED.findall(ended[0].stderr)
    assert not any("Traceback" in rank.stderr or "error" in rank.stderr for rank in ended), ended
    return int(step)


@pytest.mark.parametrize(
    ("number", "to"),
    [(signal.SIGTERM, [1]), (signal.SIGINT, [0, 1]), (signal.SIGUSR1, [0])],
    ids=["SIGTERM to rank 1", "SIGINT to both", "SIGUSR1 to rank 0"],
)
def test_the_step_is_finished_and_saved(number: int, to: list[int], work: Path, undisturbed: FinishedRun) -> None:
    """Also where the configuration has no checkpoints (`checkpoint.interval_steps` null)."""
    never = set_words(["checkpoint.interval_steps=null"])
    ranks = start_run(work, *never)
    wait_until(lambda: has_done(work, 3), ranks)
    for rank in to:
        os.kill(ranks[rank].pid, number)
    ended = wait_for(ranks)
    step = step_of_stop(ended)
    assert [path.name for path in (work / "run").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    said = [f"{signal.Signals(number).name}: finishing the step, then saving" in rank.stderr for rank in ended]
    assert said == [rank in to for rank in range(2)]
    resumed, _ = carry_out(work, *never, *RESUME)
    assert_same_run(resumed, undisturbed)


def test_one_process(work: Path) -> None:
    """Without a launcher, and without a process to agree with."""
    ranks = start_run(work, num_ranks=1)
    wait_until(lambda: has_done(work, 3), ranks)
    os.kill(ranks[0].pid, signal.SIGTERM)
    step = step_of_stop(wait_for(ranks))
    assert (work / "run" / f"checkpoint-{step}").is_dir()
    whole, _ = carry_out(work, *set_words(["train.output_dir=whole"]), num_ranks=1, output="whole")
    resumed, _ = carry_out(work, *RESUME, num_ranks=1)
    assert_same_run(resumed, whole)


def test_an_evaluation_that_was_due_is_made_up(work: Path) -> None:
    """The stop comes after a step that is followed by an evaluation: here after every step."""
    words = set_words(["train.eval_interval_steps=1", "train.max_steps=6"])
    ranks = start_run(work, *words)
    wait_until(lambda: has_done(work, 2), ranks)
    os.kill(ranks[0].pid, signal.SIGTERM)
    step_of_stop(wait_for(ranks))
    resumed, _ = carry_out(work, *words, *RESUME)
    assert sorted(resumed.by_step("eval", "loss")) == list(range(7))


def test_before_the_first_step_there_is_nothing_to_save(work: Path) -> None:
    ranks = start_run(work)
    wait_until(lambda: (work / "run" / "metrics.jsonl").exists(), ranks)
    os.kill(ranks[1].pid, signal.SIGTERM)
    ended = wait_for(ranks)
    assert [rank.exit_code for rank in ended] == [STOPPED_EXIT_CODE] * 2, ended
    assert "before step 1: there is nothing new to save" in ended[0].stderr
    assert not any((work / "run").glob("*checkpoint*"))


def test_a_second_signal_ends_at_once(work: Path) -> None:
    """Rank 1 is stopped, so that rank 0 cannot finish the step."""
    ranks = start_run(work, *set_words(["train.stall_timeout_s=60"]))
    wait_until(lambda: has_done(work, 3), ranks)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    try:
        # Copies of the first signal, as launchers make them, are not taken for a second one.
        for _ in range(3):
            os.kill(ranks[0].pid, signal.SIGTERM)
            time.sleep(0.2)
        ranks[0].process.join(1.0)
        assert ranks[0].process.is_alive()
        time.sleep(SECOND_SIGNAL_AFTER_S)
        os.kill(ranks[0].pid, signal.SIGINT)
        (ended,) = wait_for(ranks[:1], 5.0)
    finally:
        ranks[1].process.kill()
    assert ended.exit_code == 128 + signal.SIGINT
    assert "SIGINT, the second signal: ending at once, nothing is saved" in ended.stderr


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]


def command_of(launcher: str) -> list[str | Path]:
    if launcher == "deepspeed":
        return [PROGRAMS / "deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()), TRAIN, *ARGUMENTS]
    if launcher == "accelerate":
        return [PROGRAMS / "accelerate", "launch", "--config_file", ACCELERATE_CPU, TRAIN, *ARGUMENTS]
    return [PROGRAMS / "torchrun", "--standalone", "--nproc-per-node", "2", TRAIN, *ARGUMENTS]


@pytest.mark.parametrize(
    ("launcher", "to"),
    [
        ("deepspeed", "command"),
        ("deepspeed", "node"),
        ("deepspeed", "terminal"),
        ("deepspeed", "ranks"),
        ("torchrun", "command"),
        ("torchrun", "terminal"),
        ("accelerate", "command"),
    ],
)
def test_launchers(launcher: str, to: str, work: Path, undisturbed: FinishedRun) -> None:
    """The signal goes to the command that was typed, to the process that it starts on a node, to the ranks alone, or to
    all processes at once, as Ctrl-C in a terminal does."""
    command = command_of(launcher)
    process = start(command, work)
    deadline = time.monotonic() + 120
    while not has_done(work, 3):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    nodes = children(process.pid) if launcher == "deepspeed" else [process.pid]
    ranks = [child for node in nodes for child in children(node)]
    assert len(ranks) == 2
    everyone = {process.pid, *nodes, *ranks}
    for pid in {"command": [process.pid], "node": nodes, "terminal": everyone, "ranks": ranks}[to]:
        os.kill(pid, signal.SIGINT if to == "terminal" else signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    output = stdout + stderr
    (step,) = STOPPED.findall(output)
    assert "the second signal" not in output, output
    assert (work / "run" / f"checkpoint-{step}").is_dir()
    assert process.returncode != 0
    if to == "ranks":
        assert process.returncode == STOPPED_EXIT_CODE, output
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in everyone):
        assert time.monotonic() < deadline, "a process is left over"
        time.sleep(0.1)
    resumed, _ = carry_out(work, *RESUME)
    assert_same_run(resumed, undisturbed)
