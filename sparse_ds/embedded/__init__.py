"""The model and the data inside the package: what a run uses when it is given no other, with no network.

Both are made by ``scripts/make_embedded_model.py``. This module knows their paths only and imports nothing heavy.
"""

from __future__ import annotations

from pathlib import Path

from sparse_ds.config.errors import UserError

EMBEDDED_MODEL = "embedded"
"""The value of ``model.name_or_path`` that means the model inside the package."""

_FOLDER = Path(__file__).resolve().parent
_DATA = {
    "embedded:train": _FOLDER / "instructions_train.jsonl",
    "embedded:eval": _FOLDER / "instructions_eval.jsonl",
}


def resolve_model(name: str) -> str | Path:
    """Turn ``model.name_or_path`` into what ``from_pretrained`` takes.

    Args:
        name: ``"embedded"``, or any path or hub name.

    Returns:
        The folder of the embedded model, or ``name`` as it was given.

    Raises:
        UserError: ``name`` starts with ``embedded:``, which names data.
    """
    if name == EMBEDDED_MODEL:
        return _FOLDER / "tiny_llama"
    if name.startswith(f"{EMBEDDED_MODEL}:"):
        raise UserError(
            f"model.name_or_path: there is no embedded model {name!r}; expected {EMBEDDED_MODEL!r} "
            "(the one model inside the package), a folder or a hub name"
        )
    return name


def resolve_data(name: str) -> str | Path:
    """Turn ``data.train`` or ``data.eval`` into the path of a file.

    Args:
        name: ``"embedded:train"``, ``"embedded:eval"``, or any path or data set name.

    Returns:
        The embedded JSON Lines file, or ``name`` as it was given.

    Raises:
        UserError: ``name`` is ``embedded`` or starts with ``embedded:`` and no such data is inside the package.
    """
    if name in _DATA:
        return _DATA[name]
    if name == EMBEDDED_MODEL or name.startswith(f"{EMBEDDED_MODEL}:"):
        existing = ", ".join(repr(known) for known in _DATA)
        raise UserError(f"data: there is no embedded data {name!r}; expected one of {existing}, or the path of a file")
    return name
