"""Tokenized data on disk: made once, by one process, and never wrong."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from sparse_ds.config.errors import UserError
from sparse_ds.config.schema import DataConfig
from sparse_ds.data import DataBundle, DataSettings, TokenizedData, build_datasets
from sparse_ds.data.sources import open_source
from sparse_ds.data.token_cache import ENTRY_FILE, TOKENS_FILE, TokenCache, source_fingerprint

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
Writer = Callable[..., Path]
ROWS = [{"prompt": f"Q{number}", "completion": "x" * (number + 1)} for number in range(5)]


def settings(train: Path, **others: object) -> DataSettings:
    return DataConfig.model_validate({"eval": None, "sequence_length": 64, "train": str(train), **others})


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir()} if folder.is_dir() else set()


def is_mapped(bundle: DataBundle) -> bool:
    return bool(bundle.train.cache_files)


def check_same(left: TokenizedData, right: TokenizedData) -> None:
    assert left.dataset.to_dict() == right.dataset.to_dict()
    assert left.dataset.features == right.dataset.features
    for each in fields(TokenizedData):
        if each.name != "dataset":
            assert getattr(left, each.name) == getattr(right, each.name), each.name


def test_made_once_and_then_read(write_jsonl: Writer, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = settings(write_jsonl(*ROWS), eval=str(write_jsonl(*ROWS[:2], name="eval.jsonl")))
    plain = build_datasets(config, tokenizer, num_sample_prompts=2)
    first = build_datasets(config, tokenizer, num_sample_prompts=2, cache_folder=tmp_path / "cache")
    made = entries(tmp_path / "cache")
    assert len(made) == 2
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    second = build_datasets(config, tokenizer, num_sample_prompts=2, cache_folder=tmp_path / "cache")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == stamps
    assert is_mapped(first) and is_mapped(second) and not is_mapped(plain)
    for bundle in (first, second):
        check_same(bundle.train_data, plain.train_data)
        check_same(bundle.eval_data, plain.eval_data)
        assert bundle.sample_prompts == plain.sample_prompts


def test_labels(write_jsonl: Writer, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = settings(write_jsonl({"text": "a", "label": "no"}, {"text": "b", "label": "yes"}))
    bundles = [
        build_datasets(config, tokenizer, task="sequence_classification", cache_folder=folder)
        for folder in (None, tmp_path / "cache", tmp_path / "cache")
    ]
    for bundle in bundles[1:]:
        check_same(bundle.train_data, bundles[0].train_data)
    assert bundles[2].train_data.labels == ("no", "yes")


def test_what_a_key_depends_on(write_jsonl: Writer, make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    cache, path = tmp_path / "cache", write_jsonl(*ROWS)
    tokenizer = make_tokenizer(chat_template="{{ messages }}")

    def build(config: DataSettings, of: PreTrainedTokenizerFast = tokenizer, **others: Any) -> int:
        bundle = build_datasets(config, of, cache_folder=cache, **others)
        assert bundle.train_data.source == config.train
        return len(entries(cache))

    assert build(settings(path)) == 1
    assert build(settings(path, packing=True, cache=True, num_eval_samples=3)) == 1
    moved = path.rename(path.with_name("moved.jsonl"))
    assert build(settings(moved)) == 1, "the name is not the content"
    assert build(settings(moved, sequence_length=63)) == 2
    assert build(settings(moved, template="chatml")) == 3, "a setting that this test does not know"
    assert build(settings(moved), num_sample_prompts=2) == 4
    assert build(settings(moved), make_tokenizer(chat_template="{{ messages }} ")) == 5
    assert build(settings(moved), make_tokenizer(template="<s> $A </s>", chat_template="{{ messages }}")) == 6
    longer = make_tokenizer(chat_template="{{ messages }}")
    longer.add_tokens(["xx"])
    assert build(settings(moved), longer) == 7
    moved.write_text(moved.read_text(encoding="utf-8") + json.dumps(ROWS[0]) + "\n", encoding="utf-8")
    assert build(settings(moved)) == 8


def test_sources_by_their_content(tmp_path: Path) -> None:
    def saved(name: str, rows: list[dict[str, str]]) -> Path:
        Dataset.from_list(rows).save_to_disk(tmp_path / name)
        return tmp_path / name

    def fingerprint(path: Path) -> str:
        return source_fingerprint(open_source(path, field="data.train", split="train"))

    texts = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]
    for path, text in zip(texts, ("one", "one", "two"), strict=True):
        path.write_text(text, encoding="utf-8")
    first, second, third = map(fingerprint, texts)
    assert first == second != third
    one, other = fingerprint(saved("one", ROWS)), fingerprint(saved("other", ROWS[:2]))
    assert one == fingerprint(tmp_path / "one") != other
    # Without known files: by the rows.
    source = open_source(tmp_path / "one", field="data.train", split="train")
    source.contents = ()
    by_rows = source_fingerprint(source)
    source.__init__(
        "x", "data.train", lambda keep_broken=False: iter(list(open_source(tmp_path / "one", field="f", split="s")))
    )  # type: ignore[misc]
    assert source_fingerprint(source) == by_rows != one


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a token": lambda entry: _flip(entry / TOKENS_FILE, -200),
    "shorter tokens": lambda entry: os.truncate(entry / TOKENS_FILE, 100),
    "no tokens": lambda entry: (entry / TOKENS_FILE).unlink(),
    "a number": lambda entry: (entry / ENTRY_FILE).write_text(
        (entry / ENTRY_FILE).read_text(encoding="utf-8").replace('"num_truncated": 0', '"num_truncated": 9'), "utf-8"
    ),
    "no JSON": lambda entry: (entry / ENTRY_FILE).write_text("{", "utf-8"),
    "not UTF-8": lambda entry: (entry / ENTRY_FILE).write_bytes(b"\xff"),
    "a list": lambda entry: (entry / ENTRY_FILE).write_text("[]", "utf-8"),
    "empty": lambda entry: (entry / ENTRY_FILE).write_text("", "utf-8"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_again(
    damage: str,
    write_jsonl: Writer,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache, config = tmp_path / "cache", settings(write_jsonl(*ROWS))
    build_datasets(config, tokenizer, cache_folder=cache)
    (name,) = entries(cache)
    before = {path.name: path.read_bytes() for path in (cache / name).iterdir()}
    DAMAGES[damage](cache / name)
    assert {path.name: path.read_bytes() for path in (cache / name).iterdir()} != before
    with caplog.at_level(logging.WARNING, "sparse_ds"):
        again = build_datasets(config, tokenizer, cache_folder=cache)
    assert caplog.text.count("is damaged (") == caplog.text.count("will be made again") == 1
    check_same(again.train_data, build_datasets(config, tokenizer).train_data)
    assert {path.name: path.read_bytes() for path in (cache / name).iterdir()} == before


def test_a_folder_that_cannot_be_written(
    write_jsonl: Writer, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()  # permissions do not stop root
    config = settings(write_jsonl(*ROWS))
    with caplog.at_level(logging.WARNING, "sparse_ds"):
        bundle = build_datasets(config, tokenizer, cache_folder=tmp_path / "file")
    assert "data.cache_dir: " in caplog.text and "the tokens of data.train stay in memory" in caplog.text
    assert not is_mapped(bundle)
    check_same(bundle.train_data, build_datasets(config, tokenizer).train_data)


@dataclass(frozen=True)
class Kept:
    """The least that can be kept."""

    dataset: Dataset
    maker: int


@dataclass(frozen=True)
class Report:
    """What one process got."""

    pid: int
    maker: int | None
    error: str
    said: list[str]


def _ask(path: Path, cache: Path, makers: Path, fails: bool, connection: Any) -> None:
    said: list[str] = []

    def emit(record: logging.LogRecord) -> None:
        said.append(record.getMessage())
        with (makers.parent / "said").open("a", encoding="utf-8") as file:
            file.write(record.getMessage() + "\n")

    handler = logging.Handler()
    handler.emit = emit  # type: ignore[method-assign]
    logging.getLogger("sparse_ds").addHandler(handler)

    def make() -> Kept:
        with makers.open("a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
        while not (makers.parent / "go").exists():
            time.sleep(0.01)
        if fails:
            raise UserError("line 7 is bad")
        return Kept(Dataset.from_dict({"input_ids": [[1, 2], [3]]}), os.getpid())

    maker, error = None, ""
    try:
        source = open_source(path, field="data.train", split="train")
        maker = TokenCache(cache, {}).get(source, {}, Kept, make, field="data.train")[0].maker
    except UserError as raised:
        error = str(raised)
    connection.send(Report(os.getpid(), maker, error, said))


class Askers:
    """Processes that ask for the same data at the same time; a maker goes on once `go` has been called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["sparse_ds.data.token_cache", "transformers", "torch"])
        self.asked: list[tuple[Any, Any]] = []
        (folder / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n", encoding="utf-8")

    def start(self, count: int, *, fails: bool = False) -> None:
        for _ in range(count):
            receiver, sender = self._context.Pipe(duplex=False)
            arguments = (self.folder / "rows.jsonl", self.folder / "cache", self.folder / "makers", fails, sender)
            process = self._context.Process(target=_ask, args=arguments, daemon=True)
            process.start()
            sender.close()
            self.asked.append((process, receiver))

    def wait_for(self, *, makers: int, waiting: int) -> None:
        """Until so many processes have begun to tokenize, and so many have said that they wait."""
        deadline = time.monotonic() + 60
        while len(self.makers) < makers or len(self._lines("said")) < waiting:
            assert time.monotonic() < deadline, "nobody tokenizes, or nobody waits"
            time.sleep(0.01)

    def go(self) -> None:
        (self.folder / "go").touch()

    @property
    def makers(self) -> list[int]:
        return [int(line) for line in self._lines("makers")]

    def _lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def reports(self) -> list[Report]:
        reports = []
        for process, receiver in self.asked:
            assert receiver.poll(60), "no answer"
            reports.append(receiver.recv())
            process.join(10)
        self.asked = []
        return reports

    def end(self) -> None:
        for process, _ in self.asked:
            process.kill()
            process.join()


@pytest.fixture
def askers(tmp_path: Path) -> Iterator[Askers]:
    asking = Askers(tmp_path)
    yield asking
    asking.end()


def test_one_process_makes_it_and_the_others_wait(askers: Askers) -> None:
    askers.start(3)
    askers.wait_for(makers=1, waiting=2)
    assert len(askers.makers) == 1
    askers.go()
    reports = askers.reports()
    (maker,) = askers.makers
    assert [report.maker for report in reports] == [maker] * 3
    for report in reports:
        waits = [] if report.pid == maker else [True]
        assert [f"waiting for process {maker} on " in line for line in report.said] == waits
        assert all(line.endswith("to tokenize data.train") for line in report.said)


def test_a_mistake_is_found_once_for_all_that_wait(askers: Askers) -> None:
    askers.start(3, fails=True)
    askers.wait_for(makers=1, waiting=2)
    askers.go()
    assert [report.error for report in askers.reports()] == ["line 7 is bad"] * 3
    assert len(askers.makers) == 1
    askers.start(1)  # later: it tries by itself
    (report,) = askers.reports()
    assert report.error == "" and report.maker == askers.makers[1]


def test_a_killed_maker_has_a_successor(askers: Askers) -> None:
    askers.start(2)
    askers.wait_for(makers=1, waiting=1)
    (killed,) = (process for process, _ in askers.asked if process.pid == askers.makers[0])
    askers.asked = [asked for asked in askers.asked if asked[0] is not killed]
    killed.kill()
    killed.join()
    (key,) = (path.stem for path in (askers.folder / "cache").glob("*.lock"))
    leftover = askers.folder / "cache" / f".{key}.partial-1234"
    leftover.mkdir()
    askers.wait_for(makers=2, waiting=1)
    askers.go()
    (report,) = askers.reports()
    assert not leftover.exists()
    assert report.maker == report.pid == askers.makers[1] != killed.pid
