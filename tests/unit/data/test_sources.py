"""What data.train and data.eval may name: files, saved data sets, hub names, embedded names, and near misses."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict

from sparse_ds.config.errors import UserError
from sparse_ds.data import sources
from sparse_ds.data.sources import RowSource, TextSource, open_source

ROWS = [{"text": "one"}, {"text": "two"}]


def open_train(source: str | Path, split: str = "train") -> RowSource | TextSource:
    return open_source(source, field="data.train", split=split)


def fields_of(source: RowSource | TextSource) -> list[dict]:
    assert isinstance(source, RowSource)
    return [dict(row.fields) for row in source]


def test_file_can_be_read_twice(write_jsonl: Callable[..., Path]) -> None:
    source = open_train(write_jsonl(*ROWS))
    assert fields_of(source) == fields_of(source) == ROWS
    assert source.first.fields == ROWS[0]


def test_suffix_in_capitals(write_jsonl: Callable[..., Path]) -> None:
    assert fields_of(open_train(write_jsonl(*ROWS, name="ROWS.JSONL"))) == ROWS


def test_home_and_working_directory(
    write_jsonl: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(*ROWS)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert fields_of(open_train("~/rows.jsonl")) == fields_of(open_train("rows.jsonl")) == ROWS


def test_text_file(tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text("Once upon a time")
    source = open_train(tmp_path / "story.txt")
    assert isinstance(source, TextSource)
    assert source.texts == ("Once upon a time",)


def test_saved_dataset(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    source = open_train(tmp_path / "saved", split="validation")
    assert fields_of(source) == ROWS
    assert source.first.location == f"{tmp_path / 'saved'}, row 1"


def test_saved_dataset_dict_has_splits(tmp_path: Path) -> None:
    parts = {"train": Dataset.from_list(ROWS[:1]), "held_out": Dataset.from_list(ROWS[1:])}
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert fields_of(open_train(tmp_path / "saved")) == ROWS[:1]
    assert fields_of(open_train(f"{tmp_path / 'saved'}:held_out")) == ROWS[1:]
    with pytest.raises(
        UserError, match=r"no split 'validation'; it has train, held_out\. Name one, as in .*saved:train"
    ):
        open_train(tmp_path / "saved", split="validation")


def test_damaged_saved_dataset(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"the data set saved in .*saved cannot be loaded"):
        open_train(tmp_path / "saved")


@pytest.mark.parametrize(
    ("source", "name", "split"),
    [
        ("owner/name", ["owner/name"], "train"),
        ("owner/name:test", ["owner/name"], "test"),
        ("owner/name@main", ["owner/name", "main"], "train"),
        ("owner/name@main:train[:10%]", ["owner/name", "main"], "train[:10%]"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_hub_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, name: list[str], split: str, streaming: bool
) -> None:
    calls = []

    def load(*arguments: str, **settings: str) -> Dataset:
        calls.append((arguments, settings))
        return Dataset.from_list(ROWS)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load)
    opened = open_source(source, field="data.train", split="train", streaming=streaming)
    assert fields_of(opened) == ROWS
    assert calls == [(tuple(name), {"split": split, **({"streaming": True} if streaming else {})})]
    assert opened.first.location == f"{'@'.join(name)}:{split}, row 1"


def test_hub_failure_keeps_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def load(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nlong trace")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=r"data\.train: owner/name is no file or folder here.*Couldn't reach") as caught:
        open_train("owner/name")
    assert "long trace" not in str(caught.value)


def test_folder_of_that_name_is_not_looked_up_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("looked up on the hub"))
    with pytest.raises(UserError, match=r"no such file: data/train"):
        open_train("data/train")


def test_embedded_name(monkeypatch: pytest.MonkeyPatch, write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    path = write_jsonl(*ROWS)
    monkeypatch.setattr(sources, "resolve_data", lambda name: path if name == "embedded:train" else name)
    assert fields_of(open_train("embedded:train")) == ROWS
    monkeypatch.setattr(sources, "resolve_data", lambda name: tmp_path / "gone.jsonl")
    with pytest.raises(RuntimeError, match=r"gone\.jsonl, a part of this package, is missing"):
        open_train("embedded:train")


def test_unknown_embedded_name() -> None:
    with pytest.raises(UserError, match=r"embedded:trian"):
        open_train("embedded:trian")


def test_missing_file_suggests_the_nearest(write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    path = write_jsonl(*ROWS, name="alpaca_train.jsonl")
    with pytest.raises(UserError, match=rf"data\.train: no such file: .*Did you mean {path}\?"):
        open_train(tmp_path / "alpaca_trian.jsonl")


def test_missing_file_without_a_near_one_shows_the_working_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"no such file: .*Working directory: {Path.cwd()}"):
        open_train(tmp_path / "alpaca.jsonl")


def test_files_have_no_splits(write_jsonl: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl is a file and has no split 'train'\. Write the path alone"):
        open_train(f"{write_jsonl(*ROWS)}:train")


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"The folder {tmp_path / 'a'} does not exist"):
        open_train(tmp_path / "a" / "b" / "rows.jsonl")


def test_unknown_suffix(tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    (tmp_path / "rows").write_bytes(b"{}")
    with pytest.raises(UserError, match=r"rows\.xlsx has the suffix '\.xlsx', expected one of \.jsonl"):
        open_train(tmp_path / "rows.xlsx")
    with pytest.raises(UserError, match=r"rows has the suffix 'none'"):
        open_train(tmp_path / "rows")


def test_folder_of_files_in_the_order_of_their_names(write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    write_jsonl(*ROWS, name="b.jsonl")
    (tmp_path / "a.csv").write_text("text\nzero\n")
    (tmp_path / "README.md").write_text("no data")
    source = open_train(tmp_path, split="validation")
    assert fields_of(source) == [{"text": "zero"}, *ROWS]
    assert [row.location for row in source] == [
        f"{tmp_path / 'a.csv'}, line 2",
        f"{tmp_path / 'b.jsonl'}, line 1",
        f"{tmp_path / 'b.jsonl'}, line 2",
    ]
    assert source.contents == (tmp_path / "a.csv", tmp_path / "b.jsonl")


def test_folder_of_texts(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    source = open_train(tmp_path)
    assert isinstance(source, TextSource)
    assert source.texts == ("text a", "text b")
    (tmp_path / "c.jsonl").write_text('{"text": "c"}')
    with pytest.raises(UserError, match=r"holds running text \(a\.txt\) and rows \(c\.jsonl\)"):
        open_train(tmp_path)


def test_broken_rows_are_kept_where_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{broken\n{"text": "one"}\n')
    source = open_train(path)
    assert isinstance(source, RowSource)
    assert source.first.fields == {"text": "one"}
    assert [row.broken is None for row in source.with_broken()] == [False, True]
    with pytest.raises(UserError, match=r"rows\.jsonl, line 1: broken JSON"):
        list(source)
    path.write_text("{broken\n")
    with pytest.raises(UserError, match=r"rows\.jsonl, line 1: broken JSON"):
        open_train(path)


@pytest.mark.parametrize("name", ["", "  "])
def test_empty_name(name: str) -> None:
    with pytest.raises(UserError, match=r"data\.train is empty\. Give a file"):
        open_train(name)


@pytest.mark.parametrize(
    ("name", "data"),
    [("a.jsonl", b""), ("a.jsonl", b"\n\n"), ("a.json", b"[]"), ("a.json", b""), ("a.csv", b"text\n"), ("a.csv", b"")],
)
def test_file_without_samples(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=r"data\.train: .*is empty: it holds no sample"):
        open_train(tmp_path / name)


@pytest.mark.parametrize("data", [b"", b" \n\t\n"])
def test_text_file_without_text(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UserError, match=r"data\.train: .*a\.txt is empty: it holds no text"):
        open_train(tmp_path / "a.txt")


def test_unreadable_file(write_jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(*ROWS)
    monkeypatch.setattr(os, "access", lambda *_: False)  # chmod would not stop root
    with pytest.raises(UserError, match=r"rows\.jsonl may not be read\. Check its permissions"):
        open_train(path)
