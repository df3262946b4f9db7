"""Ends a run in which a rank is lost, on all ranks, with one message that says which and where.

A collective waits for all ranks. When one is killed, stopped, cut off or hangs, the others wait in it for many minutes,
or get an error of the transport that names a socket. The main thread can do nothing about it, so a thread of its own
(`heartbeats`) does: it prints the verdict and ends the process with LOST_RANK_EXIT_CODE.

    main thread     ... collective ------------------------------------------ waits for ever
    this thread     beat  beat  beat  no word from rank 1 ... verdict: print, exit

No clean-up is lost by that: files appear by one rename, and metrics are flushed line by line.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import socket
import sys
import threading

import torch.distributed

from sparse_ds.config.errors import LOST_RANK_EXIT_CODE
from sparse_ds.distributed.heartbeats import Follower, Hub
from sparse_ds.distributed.last_collective import last_collective
from sparse_ds.distributed.verdict import Position, Verdict

logger = logging.getLogger("sparse_ds")

LOOPBACK = ("localhost", "127.0.0.1", "::1")
CONNECT_TIMEOUT_S = 20.0
SECONDS_FOR_A_VERDICT = 12.0
"""How long a rank that has failed waits for the verdict. If another rank is the cause, it brings the message and ends
this process; else the exception of this rank is the message."""


class Watchdog:
    """Watches the ranks of one run between `start` and `stop`.

    Args:
        rank: of this process.
        world_size: with one rank there is nothing to watch, and all calls do nothing.
        stall_timeout_s: how long a rank may be silent, or all ranks of a training run without a collective; None: for
            ever (a killed rank still ends the run at once).
    """

    def __init__(self, rank: int, world_size: int, stall_timeout_s: float | None) -> None:
        self._rank, self._world_size = rank, world_size
        self._stall_timeout_s = math.inf if stall_timeout_s is None else stall_timeout_s
        self._doing, self._is_training = Position().doing, False
        self._heartbeats: Hub | Follower | None = None
        self._is_named = threading.Event()

    def start(self) -> None:
        """Begin to watch.

        Collectives: one gather of rank 0's address; every rank must call it.
        """
        if self._world_size == 1:
            return
        place = f"pid {os.getpid()} on {socket.gethostname()}"
        listener, token = (_listen(), secrets.token_hex(16)) if self._rank == 0 else (None, "")
        told = None if listener is None else (_own_address(), listener.getsockname()[1], token, place)
        addresses: list[tuple[str, int, str, str] | None] = [None] * self._world_size
        torch.distributed.all_gather_object(addresses, told)
        assert addresses[0] is not None
        host, port, token, hub_place = addresses[0]
        if listener is not None:
            self._heartbeats = Hub(listener, token, place, self._position, self._stall_timeout_s, self._end)
        else:
            try:
                connected = socket.create_connection((host, port), CONNECT_TIMEOUT_S)
            except OSError as error:
                logger.error(
                    "rank %d cannot reach rank 0 at %s port %d (%s): it has no heartbeat, and waits in its collective "
                    "if another rank is lost",
                    self._rank,
                    host,
                    port,
                    error,
                )
                return
            self._heartbeats = Follower(
                connected, token, self._rank, place, hub_place, self._position, self._stall_timeout_s, self._end
            )
        self._heartbeats.start()

    def note(self, doing: str, *, is_training: bool) -> None:
        """Say where this rank is, for the message.

        Args:
            doing: like `step 7`.
            is_training: whether a missing collective is a fault.
        """
        self._doing, self._is_training = doing, is_training

    def fail(self, error: BaseException) -> None:
        """To be called with what has gone wrong on this rank: tells the others, and waits for the verdict.

        Does not return if another rank is the cause. Collectives: none.
        """
        if self._heartbeats is None:
            return
        first_line = (str(error).strip().splitlines() or [""])[0]
        self._heartbeats.failure = f"{type(error).__name__}: {first_line[:500]}"
        self._is_named.wait(SECONDS_FOR_A_VERDICT)

    def stop(self) -> None:
        """Watch no more; after the last collective of all ranks. Collectives: none."""
        if self._heartbeats is not None:
            self._heartbeats.leave()
            self._heartbeats = None

    def _position(self) -> Position:
        return Position(self._doing, last_collective(), self._is_training)

    def _end(self, verdict: Verdict) -> None:
        assert self._heartbeats is not None
        if self._rank in verdict.ranks and self._heartbeats.failure is not None:
            self._is_named.set()
            return
        # Who read the output may be gone as well.
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            print(
                f"error (rank {self._rank}): the run ends because {verdict.message} This rank is in "
                f"{self._position()}. Go on with `--resume auto` once the cause is removed.",
                file=sys.stderr,
                flush=True,
            )
        os._exit(LOST_RANK_EXIT_CODE)


def _listen() -> socket.socket:
    """On all interfaces, or where all ranks are on this machine on its loopback only."""
    if os.environ["MASTER_ADDR"] in LOOPBACK:
        return socket.create_server(("127.0.0.1", 0), backlog=1024)
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
        except OSError:
            pass
    return socket.create_server(("", 0), backlog=1024)


def _own_address() -> str:
    """By which the other ranks reach this one: the address on the way to MASTER_ADDR, which most often is this host."""
    master = os.environ["MASTER_ADDR"]
    if master in LOOPBACK:
        return "127.0.0.1"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # No packet is sent: the kernel only chooses the way.
            probe.connect(address)
            own = str(probe.getsockname()[0])
    except OSError:
        return master
    # Where the name leads to this host by its loopback, the others may still reach it by the name.
    is_loopback = own == "::1" or own.startswith("127.")
    return master if is_loopback or own == address[0] else own
