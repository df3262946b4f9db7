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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
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
    num_ranks, port = len(folders), free_port()
    context = _context()
    processes = []
    logs = [folder.parent / f"{folder.name}.rank{rank}" for rank, folder in enumerate(folders)]
    for rank, (folder, log) in enumerate(zip(folders, logs, strict=True)):
        variables = {} if num_ranks == 1 else rank_variables(rank, num_ranks, port)
        process = context.Process(target=_rank_main, args=(arguments[rank], folder, variables, log), daemon=True)
        process.start()
        processes.append(process)
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in late:
        processes[rank].kill()
        processes[rank].join()
    ended = [
        Ended(process.exitcode or 0, _text(log, "out"), _text(log, "err"))
        for process, log in zip(processes, logs, strict=True)
    ]
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


def _rank_main(arguments: Sequence[str], folder: Path, variables: Mapping[str, str], log: Path) -> None:
    for descriptor, suffix in ((1, "out"), (2, "err")):
        target = os.open(f"{log}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, descriptor)
        os.close(target)
    for name in filter(is_launcher_variable, list(os.environ)):
        del os.environ[name]
    os.environ.update(variables)
    os.chdir(folder)
    sys.argv = ["launcher/train.py", *arguments]
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
