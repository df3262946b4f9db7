"""Which rank is named as the cause, from what the ranks last said."""

from __future__ import annotations

from typing import Any

from sparse_ds.distributed.last_collective import Collective
from sparse_ds.distributed.verdict import Position, RankState, find_verdict

LIMIT_S = 60.0


def state(rank: int, *, number: int = 100, is_training: bool = True, **fields: Any) -> RankState:
    position = Position("step 7", Collective(number, "gloo:all_gather"), is_training)
    return RankState(
        rank, f"pid {rank} on host", **{"heard_s": 1000.0, "moved_s": 1000.0, "position": position, **fields}
    )


def ranks_of_verdict(*states: RankState, now_s: float = 1000.0) -> tuple[int, ...] | None:
    verdict = find_verdict(states, now_s, LIMIT_S)
    return None if verdict is None else verdict.ranks


def test_nothing_is_wrong() -> None:
    assert ranks_of_verdict(state(0), state(1), state(2)) is None
    assert ranks_of_verdict() is None


def test_a_closed_connection_names_its_rank_after_a_moment() -> None:
    closed = state(1, is_closed=True, trouble_s=999.0)
    assert ranks_of_verdict(state(0), closed, now_s=1000.0) is None
    assert ranks_of_verdict(state(0), closed, now_s=1001.0) == (1,)


def test_a_killed_rank_comes_before_those_that_fail_because_of_it() -> None:
    failed = state(1, failure="RuntimeError: Connection closed by peer", trouble_s=998.0)
    killed = state(2, is_closed=True, trouble_s=998.1)
    assert ranks_of_verdict(state(0), failed, killed) == (2,)


def test_of_several_failures_the_first() -> None:
    first = state(2, failure="OutOfMemoryError: 3 GiB", trouble_s=997.0)
    later = state(1, failure="RuntimeError: Connection closed by peer", trouble_s=997.5)
    verdict = find_verdict([state(0), later, first], 1000.0, LIMIT_S)
    assert verdict is not None and verdict.ranks == (2,)
    assert verdict.message == (
        "rank 2 (pid 2 on host) failed: OutOfMemoryError: 3 GiB. It was last heard of in step 7, collective 100 "
        "(gloo:all_gather)."
    )


def test_a_rank_that_failed_and_then_ended_has_not_been_killed() -> None:
    ended = state(1, failure="ValueError: x", trouble_s=990.0, is_closed=True)
    verdict = find_verdict([state(0), ended], 1000.0, LIMIT_S)
    assert verdict is not None and "failed: ValueError: x" in verdict.message


def test_silence() -> None:
    silent = [state(1, heard_s=940.5), state(3, heard_s=939.0)]
    assert ranks_of_verdict(state(0), *silent) == (3,)
    verdict = find_verdict([state(0), *silent], 1001.0, LIMIT_S)
    assert verdict is not None and verdict.ranks == (1, 3)
    assert "has not been heard of for 62 s (train.stall_timeout_s 60)" in verdict.message
    assert "The same is true of rank(s) 3." in verdict.message


def test_a_failure_makes_a_short_silence_suspicious() -> None:
    """A transport error of one rank, and another that stopped answering before: a cut cable."""
    failed = state(1, failure="RuntimeError: Connection timed out", trouble_s=997.0)
    assert ranks_of_verdict(state(0), failed, state(2, heard_s=996.0)) == (1,)
    assert ranks_of_verdict(state(0), failed, state(2, heard_s=994.0)) == (2,)


def test_all_alive_but_nobody_moves() -> None:
    still = {"moved_s": 939.0}
    assert ranks_of_verdict(state(0, **still), state(1, number=99, **still), state(2, **still)) == (1,)
    assert ranks_of_verdict(state(0, **still), state(1, **still)) == (0, 1)
    # One of them moves, or is not training (it reads data, or writes the model).
    assert ranks_of_verdict(state(0, **still), state(1, number=99)) is None
    assert ranks_of_verdict(state(0, **still), state(1, number=99, is_training=False, **still)) is None


def test_a_rank_that_has_left_is_not_missed() -> None:
    assert ranks_of_verdict(state(0), state(1, has_left=True, is_closed=True, trouble_s=900.0, heard_s=900.0)) is None


def test_without_a_limit_only_a_killed_rank_counts() -> None:
    never = float("inf")
    assert find_verdict([state(0, moved_s=0.0), state(1, heard_s=0.0)], 1e9, never) is None
    verdict = find_verdict([state(0), state(1, is_closed=True, trouble_s=0.0)], 1e9, never)
    assert verdict is not None and verdict.ranks == (1,)
