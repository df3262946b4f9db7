"""metrics.jsonl stays strict JSON and survives crashes."""

from __future__ import annotations

import json
import logging
import os
import resource
from pathlib import Path

import pytest
import torch

from sparse_ds.config.errors import UserError
from sparse_ds.monitor.metrics_log import MetricsLog, read_metrics


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.jsonl"


def strict_loads(line: str) -> object:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_records_come_back_in_order_and_by_kind(path: Path) -> None:
    with MetricsLog(path) as log:
        log.write("step", {"step": 1, "loss": 2.5})
        log.write("event", {"step": 1, "per_tensor": {"a": [1, 2]}, "index_hash": None})
        log.write("step", {"step": 2, "loss": 2.0})
    assert read_metrics(path) == [
        {"kind": "step", "step": 1, "loss": 2.5},
        {"kind": "event", "step": 1, "per_tensor": {"a": [1, 2]}, "index_hash": None},
        {"kind": "step", "step": 2, "loss": 2.0},
    ]
    assert [record["step"] for record in read_metrics(path, "step")] == [1, 2]
    assert read_metrics(path, "summary") == []


def test_each_record_is_on_disk_at_once(path: Path) -> None:
    log = MetricsLog(path)
    log.write("step", {"step": 1})
    assert read_metrics(path) == [{"kind": "step", "step": 1}]
    log.close()
    log.close()


def test_numbers_that_are_not_finite_are_null_and_named(path: Path) -> None:
    record = {"loss": float("nan"), "norms": [1.0, float("inf")], "a": {"b": -float("inf")}, "lr": 0.1}
    with MetricsLog(path) as log:
        log.write("step", record)
    assert strict_loads(path.read_text()) == {
        "kind": "step",
        "loss": None,
        "norms": [1.0, None],
        "a": {"b": None},
        "lr": 0.1,
        "non_finite": {"loss": "nan", "norms.1": "inf", "a.b": "-inf"},
    }


def test_scalars_of_torch_become_numbers(path: Path) -> None:
    with MetricsLog(path) as log:
        log.write("step", {"loss": torch.tensor(1.5), "step": torch.tensor(3), "grad_norm": torch.tensor(torch.nan)})
    assert read_metrics(path) == [
        {"kind": "step", "loss": 1.5, "step": 3, "grad_norm": None, "non_finite": {"grad_norm": "nan"}}
    ]


def test_other_ranks_open_nothing(path: Path) -> None:
    with MetricsLog(path, enabled=False) as log:
        log.write("step", {"step": 1})
    assert not path.parent.exists()


def test_a_resumed_run_goes_on_after_a_line_cut_short(path: Path) -> None:
    with MetricsLog(path) as log:
        log.write("step", {"step": 1})
        log.write("step", {"step": 2})
    os.truncate(path, path.stat().st_size - 4)
    assert read_metrics(path) == [{"kind": "step", "step": 1}]
    with MetricsLog(path) as log:
        log.write("step", {"step": 2, "again": True})
    assert read_metrics(path) == [{"kind": "step", "step": 1}, {"kind": "step", "step": 2, "again": True}]


def test_a_file_of_one_line_cut_short_starts_anew(path: Path) -> None:
    path.parent.mkdir()
    path.write_text('{"kind": "st')
    assert read_metrics(path) == []
    with MetricsLog(path) as log:
        log.write("step", {"step": 1})
    assert read_metrics(path) == [{"kind": "step", "step": 1}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kind": "step"}\n{"ki\n{"kind": "step"}\n', "line 2 is not valid JSON"),
        ("[1]\n", "line 1 holds no JSON object"),
    ],
)
def test_damage_elsewhere_is_named(path: Path, text: str, message: str) -> None:
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_metrics(path)


def test_missing_file(path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl' cannot be read: No such file or directory"):
        read_metrics(path)


@pytest.mark.parametrize(("kind", "record"), [("steps", {}), ("step", {"kind": "eval"}), ("step", {"non_finite": 1})])
def test_reserved_names_are_a_broken_invariant(path: Path, kind: str, record: dict[str, object]) -> None:
    with MetricsLog(path) as log, pytest.raises(AssertionError):
        log.write(kind, record)  # type: ignore[arg-type]


def test_a_full_disk_makes_lines_wait(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file that may not grow stands for a disk that is full: the last line of it is cut, and made whole later."""
    logging.getLogger("sparse_ds").propagate = True
    path = tmp_path / "metrics.jsonl"
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsLog(path) as log:
        log.write("step", {"step": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 7, unlimited[1]))
        try:
            for step in (2, 3):
                log.write("step", {"step": step})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert [record["step"] for record in read_metrics(path)] == [1]
        assert len(caplog.records) == 1 and "cannot be written (File too large)" in caplog.text
        log.write("step", {"step": 4})
        assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4]
