"""kill -9 at 20 random moments: the other ranks end with a clear word, and the run goes on to the very same adapter."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from fault_run import EVENT_STEPS, NUM_STEPS, assert_same_run, go_on, has_done, kill, metrics_of, start_run, wait_until
from finished_runs import FinishedRun
from forks import wait_for

from sparse_ds.config.errors import LOST_RANK_EXIT_CODE

MARK = "event"
NUM_KILLS = 20
MOMENTS = ("step", "event", "save", "any")
SECONDS_TO_END = 15.0


def mark_events() -> None:
    """In a rank: write the step of each event into a file at its beginning."""
    from sparse_ds.drop_grow.event import DropAndGrow

    run = DropAndGrow.run

    def marked(self: DropAndGrow, step: int, *args: object, **kwargs: object) -> object:
        Path(f"{MARK}-{step}").touch()
        return run(self, step, *args, **kwargs)  # type: ignore[arg-type]

    DropAndGrow.run = marked  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize("number", range(NUM_KILLS))
def test_killed_and_gone_on(number: int, work: Path, undisturbed: FinishedRun) -> None:
    draw = random.Random(number)
    moment = MOMENTS[number % len(MOMENTS)]
    ranks = start_run(work, prepare=mark_events)
    run = work / "run"
    if moment == "step":
        step = draw.randrange(2, NUM_STEPS)
        wait_until(lambda: has_done(work, step), ranks)
        time.sleep(draw.uniform(0.0, 0.3))
    elif moment == "event":
        step = draw.choice(EVENT_STEPS)
        wait_until(lambda: (work / f"{MARK}-{step}").exists(), ranks)
        time.sleep(draw.uniform(0.0, 0.05))
    elif moment == "save":
        step = draw.randrange(2, NUM_STEPS, 2)
        pattern = f".checkpoint-{step}.*"
        wait_until(lambda: any(run.glob(pattern)) or (run / f"checkpoint-{step}").exists(), ranks)
        time.sleep(draw.uniform(0.0, 0.02))
    else:
        wait_until(run.exists, ranks)
        time.sleep(draw.uniform(0.0, 3.0))
    victims = draw.choice(([0], [1], [0, 1]))
    kill([ranks[victim] for victim in victims])
    for survivor in set(range(2)) - set(victims):
        (ended,) = wait_for([ranks[survivor]], SECONDS_TO_END)
        # The last moment may have come after all work was done.
        if ended.exit_code != 0:
            assert ended.exit_code == LOST_RANK_EXIT_CODE, ended
            assert f"error (rank {survivor}): the run ends because rank {victims[0]} (pid " in ended.stderr
            assert "was killed or crashed" in ended.stderr and "Traceback" not in ended.stderr
    is_over = run.exists() and "summary" in {record["kind"] for record in metrics_of(work)}
    resumed = FinishedRun.read(run) if is_over else go_on(work)[0]
    assert_same_run(resumed, undisturbed)
    assert not any(run.glob(".*")), "something half-written is left"
