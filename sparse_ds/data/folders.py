"""Which files of a folder make up a split.

Files and folders are told apart by their names as `datasets` does it for the hub: `train-00000-of-00002.parquet`,
`data/validation.jsonl`, `test/part_1.csv`. In a folder where no name says a split, every file belongs to every split.
"""

from __future__ import annotations

import os
from pathlib import Path

from datasets.data_files import DEFAULT_PATTERNS_ALL, DataFilesDict, EmptyDatasetError, get_data_patterns

from sparse_ds.config.errors import UserError
from sparse_ds.data.reading import KNOWN_SUFFIXES


def find_files(folder: Path, field: str, split: str) -> list[Path]:
    """The data files of a split, in the order of their names.

    Args:
        folder: any depth; hidden files and what `datasets` knows as no data (README.md, dataset_infos.json) are left
            out, and so is everything with another suffix.
        field: the config field that gave it, for messages.
        split: `train`, `validation` or `test`.

    Raises:
        UserError: no data file at all, none of the split, or some whose names say no split while others' do.
    """
    every = _matching(folder, {"all": ["**"]}).get("all", [])
    if not every:
        raise UserError(
            f"{field}: the folder {folder} holds no data: no file with a suffix of {' '.join(KNOWN_SUFFIXES)}, and "
            "nothing written by datasets' save_to_disk."
        )
    patterns = get_data_patterns(str(folder))
    splits = _matching(folder, patterns)
    if patterns == {str(key): value for key, value in DEFAULT_PATTERNS_ALL.items()} or not splits:
        return every
    unnamed = sorted(set(every) - {file for files in splits.values() for file in files})
    if unnamed:
        raise UserError(
            f"{field}: in the folder {folder} some files say their split by their names ({', '.join(splits)}), and "
            f"{unnamed[0].relative_to(folder)} says none ({len(unnamed)} such files). Rename them, or name a file."
        )
    if split not in splits:
        raise UserError(
            f"{field}: {folder} has no split {split!r}; its files' names say {', '.join(splits)}. Name one, as in "
            f"{folder}:{next(iter(splits))}, or a file."
        )
    return splits[split]


def _matching(folder: Path, patterns: dict[str, list[str]]) -> dict[str, list[Path]]:
    """Split -> its data files, sorted; splits without any are left out."""
    absolute = Path(os.path.abspath(folder))
    try:
        found = DataFilesDict.from_patterns(patterns, base_path=str(absolute))
    except (EmptyDatasetError, FileNotFoundError):
        return {}
    # In the result they are as the user names the folder.
    splits = {
        str(split): sorted(
            folder / path.relative_to(absolute) for path in map(Path, files) if path.suffix.lower() in KNOWN_SUFFIXES
        )
        for split, files in found.items()
    }
    return {split: files for split, files in splits.items() if files}
