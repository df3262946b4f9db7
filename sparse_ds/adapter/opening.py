"""Open an adapter, whatever holds it."""

from __future__ import annotations

from pathlib import Path

from sparse_ds.adapter.adapter import Adapter
from sparse_ds.adapter.native import load_adapter
from sparse_ds.adapter.of_checkpoint import CheckpointAdapter
from sparse_ds.checkpoint.index import INDEX_FILE


def open_adapter(path: str | Path) -> Adapter:
    """Open and check an adapter.

    Args:
        path: folder of an adapter or of a checkpoint.

    Raises:
        UserError: nothing there that holds an adapter, or something damaged.
    """
    folder = Path(path)
    if (folder / INDEX_FILE).is_file():
        return CheckpointAdapter(folder)
    return load_adapter(folder)
