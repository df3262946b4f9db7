"""One process at a time, among those of a machine or of a shared file system; no collective, no process group.

The system releases the lock of a process that dies, and the next one has its turn.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

SECONDS_BETWEEN_TRIES = 0.25
"""A waiting process tries the lock this often: rarely enough for a folder on a network file system."""
LOCK_FILE_MODE = 0o664
"""As huggingface_hub's own locks: a group may share a cache."""


@contextmanager
def turn(folder: Path, name: str, say_waiting: Callable[[str], None]) -> Iterator[bool]:
    """Wait until no other process is in the turn of this name, and keep the others out.

    A folder that cannot be written to gives everybody a turn at once: what is in it can only be read.

    Args:
        folder: of the lock, `<name>.lock`, and of `<name>.holder`, which tells the others who has it; made if missing.
        name: of the turn.
        say_waiting: called once, before waiting, with the process that has the lock ("process 7 on host").

    Yields:
        Whether another process had the turn when this one came.
    """
    lock, holder, has_waited = FileLock(folder / f"{name}.lock", mode=LOCK_FILE_MODE), folder / f"{name}.holder", False
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            has_waited = True
            say_waiting(_read_holder(holder))
            lock.acquire(poll_interval=SECONDS_BETWEEN_TRIES)
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    try:
        yield has_waited
    finally:
        if lock.is_locked:
            with suppress(OSError):
                holder.unlink(missing_ok=True)
            with suppress(OSError):
                lock.release()


def _read_holder(holder: Path) -> str:
    try:
        return holder.read_text(encoding="utf-8") or "another process"
    except OSError:  # it has the lock but a moment
        return "another process"
