"""Signals taken while a run goes on; what the ranks make of them is in tests/faults."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparse_ds.config.errors import STOPPED_EXIT_CODE, RunStoppedError
from sparse_ds.training.stop_signals import SIGNALS, StopSignals, _ancestors


def wait_for_wish(signals: StopSignals) -> str | None:
    deadline = time.monotonic() + 10
    while signals.wanted_by is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return signals.wanted_by


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_and_its_copies_are_one_wish(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with StopSignals(3, "python") as signals:
        assert signals.wanted_by is None
        for _ in range(3):
            os.kill(os.getpid(), number)
        assert wait_for_wish(signals) == number.name
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        assert signals.wanted_by == number.name
    assert [signal.getsignal(each) for each in SIGNALS] == before
    said = capfd.readouterr().err
    assert said.count(f"sparse_ds (rank 3): {number.name}: finishing the step, then saving") == 1


def test_after_the_stop_further_signals_mean_nothing() -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    try:
        with pytest.raises(RunStoppedError), StopSignals(0, "python"):
            raise RunStoppedError("stopped", STOPPED_EXIT_CODE)
        assert [signal.getsignal(each) for each in SIGNALS] == [signal.SIG_IGN] * len(SIGNALS)
    finally:
        for each, handler in zip(SIGNALS, before, strict=True):
            signal.signal(each, handler)


RANK = """
import os, time
from sparse_ds.training.stop_signals import StopSignals
with StopSignals(0, "torchrun") as signals:
    print(os.getppid(), flush=True)
    while signals.wanted_by is None:
        time.sleep(0.05)
    print(signals.wanted_by, flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not tell who started a process")
def test_a_launcher_that_has_gone_is_a_wish_to_stop() -> None:
    """The launcher ends as soon as the rank looks; the rank is then a child of another process."""
    program = (
        "import subprocess, sys\n"
        f"rank = subprocess.Popen([sys.executable, '-c', {RANK!r}], stderr=subprocess.DEVNULL)\n"
        "sys.stdin.readline()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    assert int(process.stdout.readline()) == process.pid
    process.stdin.write("end\n")
    process.stdin.close()
    # The rank keeps the other end of this pipe; it ends when the rank has seen that its launcher has gone.
    assert process.stdout.read() == "the end of torchrun\n"
    process.wait()


def test_ancestors() -> None:
    assert _ancestors(0) == []
    assert _ancestors(1) == [os.getppid()]
    assert _ancestors(2)[0] == os.getppid()
