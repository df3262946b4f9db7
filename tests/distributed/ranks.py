"""Run a function on N real gloo ranks, one process each.

The processes are forked from a server that has imported the heavy packages once, so that a rank starts in a fraction
of a second. A rank that fails makes the call fail with the tracebacks of all ranks, and a rank that hangs is ended at
the time limit.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

RANK_ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
PRELOADED = ["torch", "deepspeed", "transformers.trainer", "sparse_ds.training.run"]
SECONDS_FOR_OTHER_RANKS = 10.0
"""After one rank has failed: how long the others may take to fail too, so that the report shows all of them."""


def run_ranks(
    num_ranks: int, function: Callable[..., Any], *args: Any, join_group: bool = True, timeout_s: float = 180.0
) -> list[Any]:
    """What `function(*args)` returned on each rank.

    Args:
        num_ranks: processes.
        function: a module-level function; it finds RANK, WORLD_SIZE and the rest in the environment.
        args: picklable arguments, the same on all ranks.
        join_group: start the process group before and end it after; else the function does it.
        timeout_s: for all ranks together.
    """
    context = _context()
    port = _free_port()
    receivers: dict[Connection, int] = {}
    processes: list[BaseProcess] = []
    for rank in range(num_ranks):
        receiver, sender = context.Pipe(duplex=False)
        environment = {
            **RANK_ENVIRONMENT,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        arguments = (environment, sender, join_group, function, args)
        process = context.Process(target=_rank_main, args=arguments, daemon=True)
        process.start()
        sender.close()
        receivers[receiver] = rank
        processes.append(process)
    try:
        results, failures = _collect(receivers, time.monotonic() + timeout_s)
        for process in processes:
            process.join(0 if failures else SECONDS_FOR_OTHER_RANKS)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
    failures |= {
        rank: f"ended with exit code {process.exitcode} after its work"
        for rank, process in enumerate(processes)
        if rank in results and process.exitcode != 0 and not failures
    }
    if failures:
        text = "\n".join(f"--- rank {rank} of {num_ranks}: {failures[rank]}" for rank in sorted(failures))
        pytest.fail(f"{function.__name__} failed\n{text}", pytrace=False)
    return [results[rank] for rank in range(num_ranks)]


def _collect(receivers: dict[Connection, int], deadline: float) -> tuple[dict[int, Any], dict[int, str]]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting = dict(receivers)
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            failures.update(dict.fromkeys(waiting.values(), "no answer within the time limit"))
            break
        for receiver in ready:
            assert isinstance(receiver, Connection)
            rank = waiting.pop(receiver)
            try:
                succeeded, content = receiver.recv()
            except EOFError:
                succeeded, content = False, "ended without an answer"
            if succeeded:
                results[rank] = content
            else:
                failures[rank] = content
                deadline = min(deadline, time.monotonic() + SECONDS_FOR_OTHER_RANKS)
    return results, failures


def _rank_main(
    environment: dict[str, str],
    sender: Connection,
    join_group: bool,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(environment)
    # DeepSpeed calls collectives by names that torch has begun to rename.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*is deprecated")
    import torch

    from sparse_ds.distributed import process_group

    torch.set_num_threads(1)
    try:
        if join_group:
            process_group.start("cpu")
        content = function(*args)
        if join_group:
            process_group.stop()
        sender.send((True, content))
    except BaseException:
        sender.send((False, traceback.format_exc()))
        # Other ranks may wait in a collective for this one: leave without a barrier.
        os._exit(1)


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # The server inherits the environment at its start, and what it imports reads it.
    with pytest.MonkeyPatch.context() as patch:
        for name, value in RANK_ENVIRONMENT.items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
