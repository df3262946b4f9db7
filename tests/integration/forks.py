"""`launcher/train.py` on N ranks that are forked from a process which has imported everything.

A case then costs a second or two instead of the imports of every rank. What a launcher would set is set here; the rest
is the command line as a user types it, in a working folder of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

SERVER_ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
PRELOADED = ["torch", "deepspeed", "transformers.trainer", "sparse_ds.training.run"]
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHER_PREFIXES = ("SLURM_", "ACCELERATE_", "TORCHELASTIC_")


@dataclass(frozen=True)
class Ended:
    """One process that has ended."""

    exit_code: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Rank:
    """One process that has been started."""

    process: BaseProcess
    log: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def stdout(self) -> str:
        """What it has written so far."""
        return _text(self.log, "out")

    @property
    def stderr(self) -> str:
        return _text(self.log, "err")


def train_in_fork(arguments: Sequence[str], folder: Path, *, timeout_s: float = 120.0) -> Ended:
    """`python launcher/train.py ARGUMENTS` in `folder`: one rank."""
    return train_in_forks([arguments], [folder], timeout_s=timeout_s)[0]


def train_in_forks(
    arguments: Sequence[Sequence[str]], folders: Sequence[Path], *, timeout_s: float = 120.0
) -> list[Ended]:
    """As many ranks as there are folders, all to be ended within the time limit.

    Args:
        arguments: of the command line, by rank.
        folders: working folder, by rank.
        timeout_s: for all ranks together; a rank that is still there then fails the test.
    """
    return wait_for(start_in_forks(arguments, folders), timeout_s)


def start_in_forks(
    arguments: Sequence[Sequence[str]],
    folders: Sequence[Path],
    *,
    prepare: Callable[[], None] | None = None,
) -> list[Rank]:
    """Start as many ranks as there are folders.

    Args:
        arguments: of the command line, by rank.
        folders: working folder, by rank.
        prepare: called in every rank before the command line is read; a function of a module.
    """
    num_ranks, port = len(folders), free_port()
    context = _context()
    ranks = []
    for rank, folder in enumerate(folders):
        variables = {} if num_ranks == 1 else rank_variables(rank, num_ranks, port)
        log = folder.parent / f"{folder.name}.rank{rank}"
        process = context.Process(
            target=_rank_main, args=(arguments[rank], folder, variables, log, prepare), daemon=True
        )
        process.start()
        ranks.append(Rank(process, log))
    return ranks


def wait_for(ranks: Sequence[Rank], timeout_s: float = 120.0) -> list[Ended]:
    """How the ranks have ended; one that is still there after the time limit fails the test."""
    deadline = time.monotonic() + timeout_s
    for rank in ranks:
        rank.process.join(max(0.0, deadline - time.monotonic()))
    late = [number for number, rank in enumerate(ranks) if rank.process.is_alive()]
    for number in late:
        ranks[number].process.kill()
        ranks[number].process.join()
    ended = [Ended(rank.process.exitcode or 0, rank.stdout, rank.stderr) for rank in ranks]
    if late:
        pytest.fail(f"ranks {late} have not ended within {timeout_s} s:\n{ended}", pytrace=False)
    return ended


def rank_variables(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """What `torchrun` and others set."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def is_launcher_variable(name: str) -> bool:
    """Whether an environment variable belongs to a launcher: none of the test's own may reach a run."""
    return name in LAUNCHER_VARIABLES or name.startswith(LAUNCHER_PREFIXES)


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank_main(
    arguments: Sequence[str],
    folder: Path,
    variables: Mapping[str, str],
    log: Path,
    prepare: Callable[[], None] | None,
) -> None:
    for descriptor, suffix in ((1, "out"), (2, "err")):
        target = os.open(f"{log}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, descriptor)
        os.close(target)
    for name in filter(is_launcher_variable, list(os.environ)):
        del os.environ[name]
    os.environ.update(variables)
    os.chdir(folder)
    sys.argv = ["launcher/train.py", *arguments]
    if prepare is not None:
        prepare()
    from sparse_ds.cli import train

    sys.exit(train())


def _text(log: Path, suffix: str) -> str:
    path = Path(f"{log}.{suffix}")
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # The server inherits the environment at its start, and what it imports reads it.
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SERVER_ENVIRONMENT.items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context
