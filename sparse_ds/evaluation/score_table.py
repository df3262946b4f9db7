"""Scores of tasks as plain text."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparse_ds.config.errors import UserError
from sparse_ds.evaluation.grading import TaskScore


class TableRow(NamedTuple):
    """One metric of one task."""

    task: str
    metric: str
    value: float
    stderr: float | None
    num_samples: int | None
    note: str


def rows_of_score(score: TaskScore) -> list[TableRow]:
    """A row per metric; standard errors are beside what they belong to."""
    rows = []
    for name, value in score.metrics.items():
        if name.endswith("_stderr"):
            continue
        note = f"guessing: {score.chance:.1%}" if name == "accuracy" and score.chance is not None else ""
        rows.append(TableRow(score.task, name, value, score.metrics.get(f"{name}_stderr"), score.num_samples, note))
    return rows


def score_table(rows: Sequence[TableRow]) -> str:
    """The rows below a header; values with four digits, as they are."""
    header = ["task", "metric", "value", "+-", "samples", ""]
    cells = [
        [
            row.task,
            row.metric,
            _number(row.value),
            "" if row.stderr is None or math.isnan(row.stderr) else _number(row.stderr),
            "" if row.num_samples is None else f"{row.num_samples:,}",
            row.note,
        ]
        for row in rows
    ]
    widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header))]

    def line(row: list[str]) -> str:
        aligned = (f"{cell:{'<' if i in (0, 1, 5) else '>'}{widths[i]}}" for i, cell in enumerate(row))
        return "  ".join(aligned).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, cells)])


def save_record(record: dict[str, Any], path: Path) -> None:
    """Write a record as JSON, whole or not at all; numbers that are not finite become null.

    Raises:
        UserError: the file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(_finite(record), indent=2, default=str) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"--output: {path} cannot be written ({error.strerror}). Give another path.") from None


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.4g}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
