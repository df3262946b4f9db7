"""Write a folder so that it is either there, whole, or not there at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparse_ds.config.errors import UserError


@contextmanager
def atomic_folder(folder: Path, *, marker: str, overwrite: bool = False) -> Iterator[Path]:
    """Yields a hidden sibling folder to write into; on a clean exit it becomes `folder` in one rename.

    On any error, Ctrl-C included, the sibling is removed and an older `folder` stays as it was.

    Args:
        folder: where the result goes; missing parents are made.
        marker: file name that tells a folder of this kind. Only a folder that has it is ever replaced, so a wrong
            path cannot delete somebody's files.
        overwrite: replace an existing folder of the same kind.

    Raises:
        UserError: `folder` exists and is not empty, and `overwrite` is not set or the marker is not in it.
    """
    partial = begin_folder(folder, marker=marker, overwrite=overwrite)
    try:
        yield partial
        _make_readable(partial)
        for path in partial.rglob("*"):
            if path.is_file():
                flush_to_disk(path)
        finish_folder(partial, folder)
    except BaseException:
        abandon_folder(partial)
        raise


def begin_folder(folder: Path, *, marker: str, overwrite: bool = False) -> Path:
    """The hidden sibling of `folder` to write into; arguments and errors as for `atomic_folder`.

    `finish_folder` or `abandon_folder` has to follow.
    """
    folder = Path(os.path.realpath(folder))
    _check_replaceable(folder, marker, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial-{secrets.token_hex(4)}"
    partial.mkdir()
    return partial


def finish_folder(partial: Path, folder: Path) -> None:
    """Make `partial`, whose files are on disk, visible as `folder`."""
    folder = Path(os.path.realpath(folder))
    # After a power cut the rename must not be there before the names of the files.
    flush_to_disk(partial)
    _move_into_place(partial, folder)
    flush_to_disk(folder.parent)


def abandon_folder(partial: Path) -> None:
    """Remove what was begun."""
    shutil.rmtree(partial, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder such that it is never seen half deleted."""
    removed = folder.parent / f".{folder.name}.removed-{secrets.token_hex(4)}"
    os.rename(folder, removed)
    shutil.rmtree(removed, ignore_errors=True)


def remove_leftovers(parent: Path) -> None:
    """Delete what a killed process left in hidden folders below `parent`. No other may be writing there."""
    for name in ("partial", "replaced", "removed"):
        for path in parent.glob(f".*.{name}-*"):
            shutil.rmtree(path, ignore_errors=True)


def check_output_apart(output: Path, *sources: Path) -> None:
    """Overwriting `output` must never delete what is being read.

    Raises:
        UserError: `output` is one of `sources` or holds one.
    """
    output = output.resolve()
    for source in sources:
        if source.resolve() == output or output in source.resolve().parents:
            raise UserError(f"Output folder '{output}' holds '{source}', which is being read. Give another path.")


def flush_to_disk(path: Path) -> None:
    """Return when the content of a file, or the list of files of a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_replaceable(folder: Path, marker: str, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"Output folder '{folder}' is a file. Give another path.")
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise UserError(f"Output folder '{folder}' already exists and is not empty. Give another path or overwrite it.")
    if not (folder / marker).is_file():
        raise UserError(
            f"Output folder '{folder}' is not overwritten: it holds other files and no '{marker}'. Give another path."
        )


def _make_readable(folder: Path) -> None:
    """Give files the mode that the process's umask asks for: safetensors writes them for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)


def _move_into_place(partial: Path, folder: Path) -> None:
    if not folder.exists() or not any(folder.iterdir()):
        os.rename(partial, folder)
        return
    replaced = folder.parent / f".{folder.name}.replaced-{secrets.token_hex(4)}"
    os.rename(folder, replaced)
    try:
        os.rename(partial, folder)
    except BaseException:
        os.rename(replaced, folder)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
