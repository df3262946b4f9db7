"""`metrics.jsonl`: one strict JSON object a line, readable at any moment, also after a crash.

    {"kind": "step", "step": 3, "loss": 2.25, ...}
    {"kind": "step", "step": 4, "loss": null, "non_finite": {"loss": "nan"}}

JSON has no NaN and no infinity, and many readers stop at Python's bare `NaN`: such a number is written as null, and
`non_finite` says which field it was (nested ones as `a.b` or `a.0`) and what it held.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

from sparse_ds.config.errors import UserError

logger = logging.getLogger("sparse_ds")

Kind = Literal["load", "step", "eval", "task", "event", "skipped", "summary"]


class MetricsLog:
    """Appends records to a file and flushes after each.

    Args:
        path: of the file; missing folders are made. Existing records are kept (a resumed run goes on in the same
            file); a last line that a crash cut short is removed.
        enabled: False makes every call a no-op and opens nothing: rank 0 writes, the other ranks pass False.
    """

    def __init__(self, path: Path | str, *, enabled: bool = True) -> None:
        self.path = Path(path)
        self._file: io.FileIO | None = None
        self._waiting = b""
        """What could not be written yet."""
        if enabled:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _remove_truncated_line(self.path)
            self._file = io.FileIO(self.path, "a")

    def write(self, kind: Kind, record: Mapping[str, Any]) -> None:
        """Append one record. On a full disk it waits for the next one: a run does not end for that.

        Args:
            kind: its `kind` field.
            record: numbers, strings, booleans, None, lists and mappings of them; scalars of torch and numpy too.
        """
        assert kind in get_args(Kind), f"unknown kind {kind!r}"
        assert not {"kind", "non_finite"} & record.keys(), "`kind` and `non_finite` are written by the log"
        if self._file is None:
            return
        non_finite: dict[str, str] = {}
        content = {"kind": kind, **_to_json(record, "", non_finite)}
        if non_finite:
            content["non_finite"] = non_finite
        was_waiting = bool(self._waiting)
        self._waiting += (json.dumps(content, allow_nan=False) + "\n").encode()
        problem = self._write_waiting()
        if problem is not None and not was_waiting:
            logger.warning("%s cannot be written (%s): its lines wait in memory", self.path, problem.strerror)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._file is not None:
            if self._write_waiting() is not None:
                logger.error("%s: %d bytes could not be written and are lost", self.path, len(self._waiting))
            self._file.close()
            self._file = None

    def _write_waiting(self) -> OSError | None:
        assert self._file is not None
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            return error
        return None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path | str, kind: Kind | None = None) -> list[dict[str, Any]]:
    """All records of a metrics file, or those of one kind, in the order of writing.

    A last line that was cut short (the run was killed, or is writing right now) is left out.

    Raises:
        UserError: no such file, or a line that is no JSON object.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise UserError(f"Metrics file '{path}' cannot be read: {error.strerror}. Give the folder of a run.") from error
    records = []
    # What follows the last newline is empty, or a line that is not whole.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"Metrics file '{path}', line {number} is not valid JSON: {error}.") from error
        if not isinstance(record, dict):
            raise UserError(f"Metrics file '{path}', line {number} holds no JSON object.")
        if kind is None or record.get("kind") == kind:
            records.append(record)
    return records


def drop_records_after(path: Path, step: int) -> None:
    """Remove what a run wrote after `step`, and its summary: a run that goes on from there writes them again."""
    if not path.is_file():
        return
    kept = [record for record in read_metrics(path) if record.get("step", step + 1) <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(temporary, path)


def _to_json(value: Any, field: str, non_finite: dict[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _to_json(v, f"{field}.{k}" if field else str(k), non_finite) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(v, f"{field}.{i}", non_finite) for i, v in enumerate(value)]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        non_finite[field] = str(value)
        return None
    return value


def _remove_truncated_line(path: Path) -> None:
    if not path.is_file():
        return
    with path.open("rb+") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
