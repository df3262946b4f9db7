"""Ranks end together: a mistake on some of them becomes the same error on all."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed
from ranks import run_ranks

from sparse_ds.config.errors import UserError
from sparse_ds.distributed import process_group
from sparse_ds.distributed.process_group import agreement, rank, world_size
from sparse_ds.distributed.zero3_partitions import require_equal
from sparse_ds.model.find_base_model import require_same_base


def error_of_agreement(error: Exception | None) -> tuple[str, str]:
    """(type, message) of what leaves an agreement whose body raised `error` on this rank."""
    try:
        with agreement("reading the data"):
            if error is not None:
                raise error
    except Exception as raised:
        return type(raised).__name__, str(raised)
    return "none", ""


def check_agreements() -> dict[str, object]:
    is_last = rank() == world_size() - 1
    results: dict[str, object] = {
        "nobody": error_of_agreement(None),
        "user error of one": error_of_agreement(UserError("data.train: empty") if is_last else None),
        "file error of one": error_of_agreement(PermissionError("no access") if is_last else None),
        "defect of one": error_of_agreement(KeyError("name") if is_last else None),
        "user error of all": error_of_agreement(UserError(f"data.train: empty on {rank()}")),
        "local world size": os.environ["LOCAL_WORLD_SIZE"],
    }
    require_equal("same", "the digest")
    try:
        require_equal("other" if is_last else "same", "the set of active weights")
    except RuntimeError as raised:
        results["unequal"] = str(raised)
    # Still in step: a further collective works after every failure above.
    require_equal("same", "the digest")
    return results


def test_a_mistake_on_one_rank_ends_all_ranks() -> None:
    reports = run_ranks(3, check_agreements)
    for index, report in enumerate(reports):
        assert report["nobody"] == ("none", "")
        assert report["user error of one"] == ("UserError", "data.train: empty (on rank 2, 1 of 3 ranks)")
        assert report["file error of one"] == ("UserError", "no access (on rank 2, 1 of 3 ranks)")
        kind, message = report["defect of one"]
        assert kind == "RuntimeError"
        assert message == "reading the data failed (on rank 2, 1 of 3 ranks): KeyError: 'name'"
        assert report["user error of all"] == ("UserError", f"data.train: empty on {index}")
        assert report["local world size"] == "3"
        expected = "the set of active weights differs between ranks: rank 0 has same, ranks [2] have other values"
        assert report["unequal"].startswith(expected)


def test_one_rank_agrees_with_itself() -> None:
    (report,) = run_ranks(1, check_agreements)
    assert report["user error of one"] == ("UserError", "data.train: empty")
    assert "unequal" not in report


def error_of_base(folder: str, fingerprint: str) -> str:
    """The message with which ranks that read different base models end; "" if they do not."""
    try:
        require_same_base(Path(folder), fingerprint)
    except UserError as error:
        return str(error)
    return ""


def check_base_models() -> dict[str, str]:
    is_last = rank() == world_size() - 1
    return {
        "same": error_of_base(f"/machine-{rank()}/snapshots/abc", "f"),
        "commit": error_of_base(f"/cache/snapshots/{'def' if is_last else 'abc'}", "f"),
        "content": error_of_base("llama", "g" if is_last else "f"),
        "host": socket.gethostname(),
    }


def test_ranks_that_read_different_base_models() -> None:
    for report in run_ranks(3, check_base_models):
        assert report["same"] == ""
        for case, folders in (("commit", ["/cache/snapshots/abc", "/cache/snapshots/def"]), ("content", ["llama"] * 2)):
            first, last = (f"on {report['host']}: {folder}" for folder in folders)
            expected = f"the ranks have different base models: rank 0 {first} (2 rank(s)); rank 2 {last} (1 rank(s)). "
            assert report[case].startswith(f"model.name_or_path: {expected}"), report[case]


def test_without_a_process_group_there_is_one_rank() -> None:
    assert (rank(), world_size(), process_group.gather("a")) == (0, 1, ["a"])
    with pytest.raises(UserError, match="no rank"), agreement("reading"):
        raise UserError("no rank")
    process_group.stop()


LONG_S, COLLECTIVE_TIMEOUT_S = 8.0, 5.0
"""The limit is longer than a waiting rank sleeps between two looks (2 s)."""


def check_slow_rank(is_long: bool) -> tuple[str, float]:
    """Rank 1 takes longer than a collective may wait; rank 0 finds a mistake at once. (message, seconds)"""
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S))
    began = time.monotonic()
    try:
        with agreement("reading the data", is_long=is_long):
            if rank() == 0:
                raise UserError("data.train: empty")
            time.sleep(LONG_S)
    except Exception as error:
        return str(error), time.monotonic() - began
    return "", time.monotonic() - began


def test_a_long_agreement_outlasts_the_time_limit_of_collectives() -> None:
    for message, seconds in run_ranks(2, check_slow_rank, True, join_group=False):
        assert message == "data.train: empty (on rank 0, 1 of 2 ranks)"
        assert LONG_S <= seconds < LONG_S + 10
    message, seconds = run_ranks(2, check_slow_rank, False, join_group=False)[0]
    assert "data.train: empty" not in message and seconds < LONG_S, "a collective waits no longer than its limit"
