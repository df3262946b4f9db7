"""`sparse-ds data preview` as a user types it, and its page in a browser where one is installed."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sparse_ds import cli

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BROWSER_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--v=0",
    "--dump-dom",
]
HOSTILE = '</div><script>console.error("script")</script><img src="http://127.0.0.1:9/x.png" onerror="alert(1)">&amp;'


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a command does to logging and to the environment ends with the test."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    ours = logging.getLogger("sparse_ds")
    before = ours.handlers, ours.propagate, ours.level
    yield
    ours.handlers, ours.propagate, ours.level = before


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    completions = ["Sweet.", "Sweet.", HOSTILE]
    rows = [{"prompt": f"Question {number // 2}:\n", "completion": text} for number, text in enumerate(completions)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def preview(*arguments: str) -> int:
    return cli.main(["data", "preview", "--config", "zero3_sft_ma", *arguments])


class Texts(HTMLParser):
    """The text of a page, and the addresses that it asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.addresses, self.tags = "", [], set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def console_lines(page: Path, profile: Path) -> list[str]:
    """What a browser writes into its console while it opens a page."""
    assert BROWSER is not None
    command = [BROWSER, *BROWSER_FLAGS, f"--user-data-dir={profile}", page.as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "</html>" in ended.stdout, ended.stderr
    return [line for line in ended.stderr.splitlines() if "CONSOLE" in line]


def test_text_and_page(tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "new" / "preview.html"
    settings = [f"--set=data.train={rows}", "--set=data.eval=null", "--samples=3", f"--html={page}"]
    assert preview(*settings) == 0
    text = capsys.readouterr().out
    assert "duplicates      1 (33.3%)" in text
    assert "⟦Sweet.</s>⟧" in text
    assert "WARNING data.train: 1 of 3 samples (33.3%) are equal to an earlier one" in text
    assert "WARNING data.train: 3 samples are fewer than one step takes (32)." in text
    parser = Texts()
    parser.feed(page.read_text(encoding="utf-8"))
    assert parser.addresses == ["data:,"], "the page asks for nothing from outside"
    assert "script" not in parser.tags and "img" not in parser.tags
    for shown in ("Sweet.</s>", HOSTILE, "are equal to an earlier one", "trained"):
        assert shown in parser.text
    if BROWSER is None:
        pytest.skip("no Chromium here: the page was not opened")
    assert console_lines(page, tmp_path / "profile") == []
    bad = tmp_path / "bad.html"
    bad.write_text("<!doctype html><script>console.error('seen')</script>", encoding="utf-8")
    assert any("seen" in line for line in console_lines(bad, tmp_path / "profile")), "the check cannot fail"


def test_a_classification(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, page = tmp_path / "labeled.jsonl", tmp_path / "preview.html"
    labeled = [{"text": f"The list {number}", "label": "odd" if number % 2 else "even"} for number in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in labeled), encoding="utf-8")
    task = ["--set=model.task=sequence_classification", f"--set=data.train={path}", f"--set=data.eval={path}"]
    assert preview(*task, "--samples=1", f"--html={page}", "--colour=always") == 0
    text = capsys.readouterr().out
    assert "labels      even 50.0%, odd 50.0%" in text
    assert "data.train, sample 0 (" in text and "label even)" in text
    assert "WARNING 8 of 8 different held-out samples are in the training data too" in text
    assert re.search(r"\x1b\[2m\x1b\[7m<s>\x1b\[0m", text)
    assert "label <b>even</b>" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--set=data.train=nothing.jsonl"], "error: data.train: no such file: nothing.jsonl"),
        (["--samples=-1"], "error: --samples: got -1, expected 0 or more."),
        (["--set=model.nme=x"], "model.nme: unknown key"),
        (["--samples=0", "--html=/proc/no/preview.html"], "error: --html: /proc/no/preview.html cannot be written"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    assert preview(*arguments) == cli.USER_ERROR_EXIT_CODE
    assert expected in capsys.readouterr().err
