"""Which files of a folder make up a split: by their names, as on the hub, and never some of them silently."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_ds.config.errors import UserError
from sparse_ds.data.folders import find_files


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def found(folder: Path, split: str) -> list[str]:
    return [str(path.relative_to(folder)) for path in find_files(folder, "data.train", split)]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_files_without_a_split_belong_to_every_split(tmp_path: Path, split: str) -> None:
    # The name of the folder itself says nothing.
    folder = make(tmp_path / "train" / "x", "b.jsonl", "a/c.jsonl", "README.md", ".hidden.jsonl", "dataset_infos.json")
    assert found(folder, split) == ["a/c.jsonl", "b.jsonl"]


def test_split_in_the_names(tmp_path: Path) -> None:
    shards = [f"data/train-0000{number}-of-00002.parquet" for number in range(2)]
    folder = make(tmp_path, *shards, "data/validation-00000-of-00001.parquet", "README.md")
    assert found(folder, "train") == shards
    assert found(folder, "validation") == ["data/validation-00000-of-00001.parquet"]
    with pytest.raises(UserError, match=r"has no split 'test'; its files' names say train, validation\. .*:train"):
        found(folder, "test")


def test_split_in_the_folders(tmp_path: Path) -> None:
    assert found(make(tmp_path, "train/1.jsonl", "dev/2.jsonl"), "validation") == ["dev/2.jsonl"]


def test_files_of_no_split_among_others_are_not_left_out_silently(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\(train\), and more\.jsonl says none \(1 such files\)"):
        found(make(tmp_path, "train.jsonl", "more.jsonl"), "train")


def test_no_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train: the folder .* holds no data: no file with a suffix of \.jsonl"):
        found(make(tmp_path, "README.md", "notes.doc"), "train")


def test_files_are_named_as_the_folder_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "data/a.jsonl")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    for folder in (Path("data"), Path("link"), tmp_path / "link", Path("data/../link")):
        assert find_files(folder, "data.train", "train") == [folder / "a.jsonl"]
