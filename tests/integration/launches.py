"""The commands that a user types, as processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from forks import is_launcher_variable

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "launcher" / "train.py"
PROGRAMS = Path(sys.executable).parent
"""Where `deepspeed`, `torchrun` and `accelerate` are."""
LAUNCH_SECONDS = 300.0
"""A launch takes about 15 s on two idle cores; one that hangs must not hang the tests."""


@dataclass(frozen=True)
class Launched:
    """A command that has ended."""

    command: Sequence[str]
    exit_code: int
    stdout: str
    stderr: str
    seconds: float

    def __str__(self) -> str:
        return f"{' '.join(self.command)}\nexit code {self.exit_code}\n{self.stdout}\n{self.stderr}"


def environment_of_user(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a fresh shell in which the project's programs are found."""
    kept = {name: value for name, value in os.environ.items() if not is_launcher_variable(name)}
    return {**kept, "PATH": f"{PROGRAMS}{os.pathsep}{kept['PATH']}", **(extra or {})}


def launch(
    command: Sequence[str | Path],
    folder: Path,
    *,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = LAUNCH_SECONDS,
) -> Launched:
    """Run a command in a folder until it ends; raises TimeoutExpired if it does not."""
    return wait(start(command, folder, environment=environment), timeout_s)


def start(
    command: Sequence[str | Path], folder: Path, *, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start a command in a folder."""
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=folder,
        env=environment_of_user(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait(process: subprocess.Popen[str], timeout_s: float = LAUNCH_SECONDS) -> Launched:
    """The end of a command, which is stopped at the time limit (TimeoutExpired)."""
    begin = time.monotonic()
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        # The launchers end their ranks on SIGTERM.
        process.terminate()
        process.communicate()
        raise
    assert isinstance(process.args, list)
    return Launched(process.args, process.returncode, stdout, stderr, time.monotonic() - begin)
