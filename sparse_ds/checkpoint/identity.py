"""A run goes on from its own checkpoints only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparse_ds.config.errors import UserError

SHOWN_DIFFERENCES = 5
"""Of one table (a number per layer): the rest is counted."""


def check_identity(saved: dict[str, Any], current: dict[str, Any], folder: Path) -> None:
    """Refuse to go on from another run's checkpoint.

    Args:
        saved: identity of the run that wrote the checkpoint; plain JSON types, tables inside tables.
        current: of this run.
        folder: the checkpoint.

    Raises:
        UserError: one line `key: checkpoint | this run` for every difference.
    """
    lines = list(_describe_differences(saved, current))
    if lines:
        raise UserError(
            f"checkpoint.resume: {folder} belongs to another run (checkpoint | this run):\n"
            + "".join(f"  {line}\n" for line in lines)
            + "Use the configuration that wrote it, or start anew in another folder."
        )


def _describe_differences(saved: dict[str, Any], current: dict[str, Any]) -> Iterator[str]:
    for key in sorted(saved.keys() | current.keys()):
        left, right = saved.get(key), current.get(key)
        if left == right:
            continue
        if isinstance(left, dict) and isinstance(right, dict):
            inner = list(_describe_differences(left, right))
            yield from (f"{key}.{line}" for line in inner[:SHOWN_DIFFERENCES])
            if len(inner) > SHOWN_DIFFERENCES:
                yield f"{key}: {len(inner) - SHOWN_DIFFERENCES} more"
        else:
            yield f"{key}: {left!r} | {right!r}"
