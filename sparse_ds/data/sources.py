"""What `data.train` and `data.eval` may name, and how a name becomes rows or running text.

| name | meaning |
|---|---|
| `embedded:train`, `embedded:eval` | the instruction data that comes with the project |
| a file | `.jsonl` `.ndjson` `.json` `.csv` `.tsv` `.parquet` `.txt`, relative to the working directory |
| a folder | of such files (`folders`), or written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk` |
| `owner/name`, `owner/name@config` | a data set of the Hugging Face hub, and one of its configurations |

Some folders and hub data sets have splits: `folder:validation`, `owner/name:train[:1000]` name one. Without it the
caller's default is used (`train` for training, `validation` for evaluation), never another in its place.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import datasets

from sparse_ds.config.errors import UserError
from sparse_ds.data.folders import find_files
from sparse_ds.data.reading import KNOWN_SUFFIXES, ROW_READERS, TEXT_SUFFIX, Row, read_text
from sparse_ds.embedded import resolve_data

_HUB_NAME = re.compile(r"(?P<path>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<config>[\w.-]+))?")
_NAME_AND_SPLIT = re.compile(r"(?P<name>[^:]+):(?P<split>[\w.-]+(\[.*\])?)")
_KNOWN = " ".join(KNOWN_SUFFIXES)


class OpenRows(Protocol):
    """Starts one pass over the rows; with `keep_broken`, those that cannot be read are among them."""

    def __call__(self, *, keep_broken: bool = False) -> Iterator[Row]: ...


class RowSource:
    """Samples with named fields. Can be iterated again and again; the rows are read anew each time.

    Args:
        name: what the user gave, for messages.
        field: the config field that gave it, for messages.
        open_rows: starts one pass over the rows.
        contents: files that hold the rows, and texts that tell which of their rows are meant; empty: not known.

    Attributes:
        first: the first row that can be read.

    Raises:
        UserError: there is no row at all, or none can be read.
    """

    def __init__(self, name: str, field: str, open_rows: OpenRows, contents: Sequence[Path | str] = ()) -> None:
        self.name, self.contents = name, tuple(contents)
        self._open_rows = open_rows
        broken = None
        for row in self.with_broken():
            if row.broken is None:
                self.first = row
                return
            broken = broken or row.broken
        raise broken or UserError(f"{field}: {name} is empty: it holds no sample. Give a file with at least one.")

    def __iter__(self) -> Iterator[Row]:
        """All rows; one that cannot be read raises."""
        return self._open_rows()

    def with_broken(self) -> Iterator[Row]:
        """All rows, those that cannot be read included."""
        return self._open_rows(keep_broken=True)


class TextSource:
    """Running text: of a file, or of all `.txt` files of a folder, each from its own beginning.

    Raises:
        UserError: a file is empty or blank, or not UTF-8.
    """

    def __init__(self, name: str, field: str, *paths: Path) -> None:
        self.name = name
        self.texts = tuple(map(read_text, paths))
        for path, text in zip(paths, self.texts, strict=True):
            if not text.strip():
                raise UserError(f"{field}: {path} is empty: it holds no text. Give a file with some.")


def open_source(source: str | Path, *, field: str, split: str, streaming: bool = False) -> RowSource | TextSource:
    """Find what `source` names and look at its beginning.

    Args:
        source: a name from the table above.
        field: the config field that gave it, for messages.
        split: the split to read where there are several and `source` names none.
        streaming: read a hub data set over the network as it is used, instead of downloading it first.

    Raises:
        UserError: nothing there (with the nearest name), a suffix or folder of an unknown kind, an unknown split, an
            empty or unreadable file, a hub data set that cannot be loaded.
        RuntimeError: the embedded data is not installed.
    """
    name = str(source)
    if not name.strip():
        raise UserError(f"{field} is empty. Give a file ({_KNOWN}), a folder, owner/name on the hub or embedded:train.")
    resolved = resolve_data(name)
    if isinstance(resolved, Path):
        if not resolved.is_file():
            raise RuntimeError(f"{field}: {resolved}, a part of this package, is missing. Install the package again.")
        return _open_file(resolved, field)
    path = Path(name).expanduser()
    if path.is_file():
        return _open_file(path, field)
    if path.is_dir():
        return _open_folder(path, field, split)
    match = _NAME_AND_SPLIT.fullmatch(name)
    if match:
        name, split = match["name"], match["split"]
        path = Path(name).expanduser()
        if path.is_dir():
            return _open_folder(path, field, split)
        if path.is_file():
            raise UserError(f"{field}: {path} is a file and has no split {split!r}. Write the path alone.")
    if _is_hub_name(name):
        return _open_hub(name, field, split, streaming=streaming)
    raise _missing(name, path, field)


def _open_file(path: Path, field: str) -> RowSource | TextSource:
    _check_readable(path, field)
    suffix = path.suffix.lower()
    if suffix == TEXT_SUFFIX:
        return TextSource(str(path), field, path)
    if suffix not in ROW_READERS:
        raise UserError(
            f"{field}: {path} has the suffix {suffix or 'none'!r}, expected one of {_KNOWN}. Convert or rename it."
        )
    return _file_rows(str(path), field, [path])


def _check_readable(path: Path, field: str) -> None:
    if not os.access(path, os.R_OK):
        raise UserError(f"{field}: {path} may not be read. Check its permissions.")


def _file_rows(name: str, field: str, paths: Sequence[Path]) -> RowSource:
    def rows(*, keep_broken: bool = False) -> Iterator[Row]:
        for path in paths:
            yield from ROW_READERS[path.suffix.lower()](path, keep_broken=keep_broken)

    return RowSource(name, field, rows, paths)


def _open_folder(path: Path, field: str, split: str) -> RowSource | TextSource:
    has = {name: (path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json", "state.json")}
    if not (has["dataset_dict.json"] or (has["dataset_info.json"] and has["state.json"])):
        files = find_files(path, field, split)
        for file in files:
            _check_readable(file, field)
        is_text = [file.suffix.lower() == TEXT_SUFFIX for file in files]
        if all(is_text):
            return TextSource(str(path), field, *files)
        if any(is_text):
            raise UserError(
                f"{field}: the folder {path} holds running text ({files[is_text.index(True)].name}) and rows "
                f"({files[is_text.index(False)].name}). Put them into folders of their own."
            )
        return _file_rows(str(path), field, files)
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:
        raise UserError(f"{field}: the data set saved in {path} cannot be loaded: {_first_line(error)}") from None
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise UserError(
                f"{field}: {path} has no split {split!r}; it has {', '.join(saved) or 'none'}. "
                f"Name one, as in {path}:train."
            )
        saved = saved[split]
    return _dataset_rows(saved, str(path), field)


def _open_hub(name: str, field: str, split: str, *, streaming: bool) -> RowSource:
    match = _HUB_NAME.fullmatch(name)
    assert match
    arguments = [part for part in (match["path"], match["config"]) if part is not None]
    settings: dict[str, Any] = {"streaming": True} if streaming else {}
    try:
        dataset = datasets.load_dataset(*arguments, split=split, **settings)
        return _dataset_rows(dataset, f"{name}:{split}", field)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{field}: {name} is no file or folder here, and the split {split!r} of a hub data set of that name cannot "
            f"be loaded: {_first_line(error)} Check the name and the network, name a split as {name}:train, or give a "
            f"file ({_KNOWN})."
        ) from None


def _dataset_rows(dataset: Any, name: str, field: str) -> RowSource:
    def rows(*, keep_broken: bool = False) -> Iterator[Row]:
        for number, fields in enumerate(dataset, start=1):
            yield Row(fields, f"{name}, row {number}")

    contents: list[Path | str] = []
    if isinstance(dataset, datasets.Dataset):
        contents = [*(Path(file["filename"]) for file in dataset.cache_files), dataset._fingerprint]
    return RowSource(name, field, rows, contents)


def _is_hub_name(name: str) -> bool:
    """`owner/name`, unless it looks like a path: a known data suffix, or a local folder called `owner`."""
    if not _HUB_NAME.fullmatch(name) or Path(name).suffix.lower() in KNOWN_SUFFIXES:
        return False
    return not Path(name.split("/")[0]).is_dir()


def _missing(name: str, path: Path, field: str) -> UserError:
    """The error for a path where nothing is: the nearest name beside it, or the part of the path that is missing."""
    parent = path.parent
    if not parent.is_dir():
        while not parent.parent.is_dir():
            parent = parent.parent
        return UserError(f"{field}: no such file: {name}. The folder {parent} does not exist.")
    names = [entry.name for entry in parent.iterdir() if entry.is_dir() or entry.suffix.lower() in KNOWN_SUFFIXES]
    near = difflib.get_close_matches(path.name, names, n=1)
    hint = f"Did you mean {parent / near[0]}?" if near else f"Working directory: {Path.cwd()}."
    return UserError(
        f"{field}: no such file: {name}. {hint} Expected a file ({_KNOWN}), a folder of such files or "
        "written by save_to_disk, owner/name on the hub, embedded:train or embedded:eval."
    )


def _first_line(error: Exception) -> str:
    text = (str(error) or type(error).__name__).strip().splitlines()[0]
    return text if text.endswith((".", "!", "?")) else f"{text}."
