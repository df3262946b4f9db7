"""What is wrong with a run, told from what its ranks last said: no sockets, no clock, no threads.

In the order in which causes are looked for (what comes first explains what comes later):

    closed     its connection ended without a word: the process was killed, or crashed
    silent     nothing heard for `stall_timeout_s`: the process is stopped, or its machine is off or cut off
    failed     it said so itself: an exception in the program
    waiting    all are alive, and none has begun a collective for `stall_timeout_s`: the one that is behind holds all

A rank whose process was killed makes the others fail, with errors of the transport. So a first sign of trouble is
followed by a short wait, in which the cause shows itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sparse_ds.distributed.last_collective import Collective

SECONDS_TO_SHOW = 2.0
"""From the first sign of trouble to the verdict."""
SUSPICIOUS_SILENCE_S = 5.0
"""Once another rank has failed, a rank that has been silent for so long (five heartbeats) is taken for the cause."""


@dataclass(frozen=True)
class Position:
    """Where a rank is in the run."""

    doing: str = "the start of the run"
    """Like `step 7`."""
    collective: Collective = field(default_factory=lambda: Collective(0, ""))
    is_training: bool = False
    """Whether it is between the first step and the last, where a collective is never far."""

    def __str__(self) -> str:
        if not self.collective.number:
            return self.doing
        return f"{self.doing}, collective {self.collective}"


@dataclass
class RankState:
    """What is known of one rank. Times are seconds of one clock."""

    rank: int
    place: str
    """Process and host."""
    heard_s: float
    """When it was last heard of."""
    moved_s: float
    """When its position last changed."""
    position: Position = field(default_factory=Position)
    failure: str | None = None
    """What it said of its own end, by an exception."""
    trouble_s: float | None = None
    """When it failed or its connection closed."""
    is_closed: bool = False
    has_left: bool = False
    """It ended in good order, or is not watched at all."""

    def describe(self) -> str:
        return f"rank {self.rank} ({self.place})"


@dataclass(frozen=True)
class Verdict:
    """Why a run cannot go on."""

    ranks: tuple[int, ...]
    """The ranks that are the cause."""
    message: str
    """In full sentences, for every rank to print."""


def find_verdict(states: Iterable[RankState], now_s: float, stall_timeout_s: float) -> Verdict | None:
    """Why the run cannot go on; None while it can, or while the cause has not shown itself yet.

    Args:
        states: of all ranks.
        now_s: on the clock of the states.
        stall_timeout_s: how long a rank may be silent, and all ranks without a collective.
    """
    present = [state for state in states if not state.has_left]
    troubles = [state.trouble_s for state in present if state.trouble_s is not None]
    if troubles and now_s - min(troubles) < SECONDS_TO_SHOW:
        return None
    closed = [state for state in present if state.is_closed and state.failure is None]
    if closed:
        return _verdict(closed, "was killed or crashed: its connection closed without a word")
    limit_s = min(SUSPICIOUS_SILENCE_S, stall_timeout_s) if troubles else stall_timeout_s
    silent = [state for state in present if not state.is_closed and now_s - state.heard_s > limit_s]
    if silent:
        longest_s = max(now_s - state.heard_s for state in silent)
        return _verdict(
            silent,
            f"has not been heard of for {longest_s:.0f} s (train.stall_timeout_s {stall_timeout_s:g}): its process is "
            "stopped, or its machine is off or cut off from the others",
        )
    failed = [state for state in present if state.failure is not None]
    if failed:
        first = min(failed, key=lambda state: state.trouble_s or 0.0)
        return _verdict([first], f"failed: {first.failure}")
    return _find_waiting(present, now_s, stall_timeout_s)


def _find_waiting(present: Sequence[RankState], now_s: float, stall_timeout_s: float) -> Verdict | None:
    if not present or not all(state.position.is_training for state in present):
        return None
    stalled_s = now_s - max(state.moved_s for state in present)
    if stalled_s <= stall_timeout_s:
        return None
    fewest = min(state.position.collective.number for state in present)
    behind = [state for state in present if state.position.collective.number == fewest]
    if len(behind) == len(present):
        where = "all ranks are at the same collective"
    else:
        where = f"the others wait in collective {max(state.position.collective.number for state in present)}"
    return _verdict(
        behind,
        f"is alive but has begun no collective for {stalled_s:.0f} s (train.stall_timeout_s {stall_timeout_s:g}), and "
        f"{where}: it waits for something else (a file system, a device, a lock)",
    )


def _verdict(states: Sequence[RankState], what: str) -> Verdict:
    first = states[0]
    others = f" The same is true of rank(s) {', '.join(str(state.rank) for state in states[1:])}." if states[1:] else ""
    return Verdict(
        tuple(state.rank for state in states),
        f"{first.describe()} {what}. It was last heard of in {first.position}.{others}",
    )
