"""Start and end of the process group, and how ranks end together when one of them finds a mistake."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import deepspeed
import deepspeed.comm as dist
import torch
import torch.distributed
from deepspeed.constants import default_pg_timeout

from sparse_ds.config.errors import UserError
from sparse_ds.distributed.last_collective import keep_few_records
from sparse_ds.distributed.patience import wait_for_all

T = TypeVar("T")

SHARED_MEMORY_OP = "deepspeed_shm_comm"
"""DeepSpeed's name (`ShareMemCommBuilder.NAME`) of its own collectives for ranks on one machine's CPU."""
SECONDS_AFTER_WATCHDOG = 120.0
"""By how much a collective's own time limit is later than the watchdog's, which says more."""

_before_leaving: list[Callable[[], None]] = []


def start(device_type: str, stall_timeout_s: float | None = None) -> None:
    """Join the process group (nccl on CUDA, gloo on CPU) and learn how many ranks share this machine.

    Sets LOCAL_WORLD_SIZE, which the `deepspeed` launcher leaves out.

    Args:
        device_type: "cpu" or "cuda".
        stall_timeout_s: of the watchdog; a collective waits longer than that, and no less than DeepSpeed's default.

    Collectives: one gather of host names; every rank must call it.
    """
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        # DeepSpeed would compile a shared-memory extension at every first start; gloo does without a compiler.
        deepspeed.ops.__compatible_ops__[SHARED_MEMORY_OP] = False
    keep_few_records()
    timeout = max(default_pg_timeout, timedelta(seconds=(stall_timeout_s or 0.0) + SECONDS_AFTER_WATCHDOG))
    dist.init_distributed(dist_backend="nccl" if device_type == "cuda" else "gloo", timeout=timeout, verbose=False)
    hosts: list[str | None] = [None] * world_size()
    torch.distributed.all_gather_object(hosts, socket.gethostname())
    os.environ["LOCAL_WORLD_SIZE"] = str(hosts.count(socket.gethostname()))


def before_leaving(action: Callable[[], None]) -> None:
    """Have `stop` call `action` after the last collective, once."""
    _before_leaving.append(action)


def stop() -> None:
    """Leave the process group, all ranks together. Without it a run on gloo can end with "terminate called", code -6.

    Collectives: one barrier; every rank must call it.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        while _before_leaving:
            _before_leaving.pop()()
        torch.distributed.destroy_process_group()


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return int(torch.distributed.get_rank()) if torch.distributed.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return int(torch.distributed.get_world_size()) if torch.distributed.is_initialized() else 1


def gather(value: T) -> list[T]:
    """What every rank gave, in the order of ranks.

    Collectives: one gather of small pickled objects; every rank must call it.
    """
    values = [value] * world_size()
    if torch.distributed.is_initialized():
        torch.distributed.all_gather_object(values, value)
    return values


@contextmanager
def agreement(what: str, *, is_long: bool = False) -> Iterator[None]:
    """All ranks leave this context together: if the body fails on some ranks, every rank raises.

    The body must not communicate. A `UserError` (or OSError) of any rank becomes the same `UserError` on every rank.

    Collectives: one gather of a short text; every rank must enter.

    Args:
        what: what the body does, for the message ("reading the data").
        is_long: the body may take much longer on some ranks than on others: no rank enters the collective, whose time
            is limited, before all have done theirs.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    report = (
        None if failure is None else (type(failure).__name__, str(failure), isinstance(failure, ValueError | OSError))
    )
    reports: list[tuple[str, str, bool] | None] = [report] * world_size()
    if is_long:
        wait_for_all(what)
    if torch.distributed.is_initialized():
        torch.distributed.all_gather_object(reports, report)
    failed = [(index, entry) for index, entry in enumerate(reports) if entry is not None]
    if not failed:
        return
    if isinstance(failure, UserError) and len(failed) == len(reports):
        raise failure
    first_rank, (kind, message, from_user) = failed[0]
    where = "" if len(failed) == len(reports) else f" (on rank {first_rank}, {len(failed)} of {len(reports)} ranks)"
    if from_user:
        raise UserError(f"{message}{where}") from failure
    raise RuntimeError(f"{what} failed{where}: {kind}: {message}") from failure


def from_rank_0(what: str, make: Callable[[], T]) -> T:
    """What `make()` returns on rank 0, on every rank; if it fails there, every rank raises as in `agreement`.

    Args:
        what: what `make` does, for the message.
        make: called on rank 0 only; must not communicate. Its result is small.

    Collectives: an agreement and one broadcast; every rank must call it.
    """
    made: list[T | None] = [None]
    with agreement(what):
        if rank() == 0:
            made[0] = make()
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(made, src=0)
    return made[0]  # type: ignore[return-value]
