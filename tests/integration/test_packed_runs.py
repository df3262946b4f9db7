"""Runs with `data.packing` and the cache of tokenized data, as a user starts them: NF4, events, two ranks."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from finished_runs import FinishedRun, index_overlap
from forks import Ended, train_in_forks
from short_run import RUN_ARGUMENTS, save_rows, set_words
from transformers import AutoTokenizer

from sparse_ds.data import build_dataset
from sparse_ds.embedded import resolve_model

NUM_STEPS, ROW_LENGTH, GLOBAL_BATCH_SIZE = 8, 256, 4
PACKED = (
    *RUN_ARGUMENTS,
    *set_words(
        [
            "data.packing=true",
            f"data.sequence_length={ROW_LENGTH}",
            "data.cache_dir=cache",
            f"train.max_steps={NUM_STEPS}",
            "train.micro_batch_size=2",
            f"train.global_batch_size={GLOBAL_BATCH_SIZE}",
        ]
    ),
)
ADAPTER = Path("adapter") / "adapter_model.safetensors"


def launch(work: Path, *words: str, num_ranks: int = 2) -> list[Ended]:
    return train_in_forks([[*PACKED, *words]] * num_ranks, [work] * num_ranks)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "work"
    folder.mkdir()
    save_rows(folder)
    return folder


@pytest.fixture(scope="module")
def first(work: Path) -> tuple[FinishedRun, str]:
    """The run on two ranks, and what it said."""
    ranks = launch(work)
    assert [rank.exit_code for rank in ranks] == [0, 0], ranks
    return FinishedRun.read(work / "run"), ranks[0].stdout


def test_rows_and_tokens(work: Path, first: tuple[FinishedRun, str]) -> None:
    run, said = first
    match = re.search(
        r"data\.packing: (\d+) samples packed into (\d+) rows of 256 tokens \([\d.]+ a row\), (.*)% full", said
    )
    assert match is not None, said
    num_samples, num_rows, fill = int(match[1]), int(match[2]), float(match[3])
    tokens = build_dataset(work / "rows.jsonl", AutoTokenizer.from_pretrained(resolve_model("embedded"))).num_tokens
    assert num_samples == 100 and fill == pytest.approx(100 * tokens / (num_rows * ROW_LENGTH), abs=0.1)
    assert fill > 85
    assert "2 rank(s) x 2 packed rows x 1 micro batch(es) = 4 packed rows a step" in said
    steps_per_epoch = num_rows // GLOBAL_BATCH_SIZE
    assert run.by_step("step", "epoch")[steps_per_epoch] == 1.0
    seen = sum(list(run.by_step("step", "num_tokens").values())[:steps_per_epoch])
    assert 0.9 * tokens * steps_per_epoch * GLOBAL_BATCH_SIZE / num_rows < seen <= tokens, "padding is not counted"


def test_one_rank_sees_the_same_rows(work: Path, first: tuple[FinishedRun, str]) -> None:
    """From the cache that the two ranks have left."""
    two, _ = first
    entries = {path: path.stat().st_mtime_ns for path in (work / "cache").rglob("*")}
    assert len([path for path in entries if path.name == "tokens.arrow"]) == 2
    (rank,) = launch(work, *set_words(["train.output_dir=one"]), num_ranks=1)
    assert rank.exit_code == 0, rank
    assert {path: path.stat().st_mtime_ns for path in (work / "cache").rglob("*")} == entries
    assert "data.train: tokens read from cache" in rank.stdout
    assert "data.train: rows.jsonl: 100 samples, format alpaca (detected)" in rank.stdout
    one = FinishedRun.read(work / "one")
    assert one.by_step("step", "num_tokens") == two.by_step("step", "num_tokens")
    # bf16 sums in another order.
    assert list(one.losses.values()) == pytest.approx(list(two.losses.values()), abs=1e-2)
    assert index_overlap(one, two) >= 0.99


def test_going_on_without_the_cache(work: Path, first: tuple[FinishedRun, str], tmp_path: Path) -> None:
    """In the middle of an epoch; every rank tokenizes for itself, in memory."""
    run, _ = first
    copy = Path(shutil.copytree(work, tmp_path / "work"))
    shutil.rmtree(copy / "cache")
    settings = set_words(["data.cache=false", "data.cache_dir=null", "train.output_dir=resumed"])
    ranks = launch(copy, *settings, "--resume", "run/checkpoint-2")
    assert [rank.exit_code for rank in ranks] == [0, 0], ranks
    assert not (copy / "cache").exists()
    resumed = FinishedRun.read(copy / "resumed")
    assert resumed.losses == {step: loss for step, loss in run.losses.items() if step > 2}
    assert (resumed.folder / ADAPTER).read_bytes() == (run.folder / ADAPTER).read_bytes()


def test_a_run_does_not_go_on_with_other_rows(work: Path, first: tuple[FinishedRun, str]) -> None:
    settings = set_words(["data.packing=false", "train.output_dir=other"])
    ranks = launch(work, *settings, "--resume", "run/checkpoint-2")
    assert [rank.exit_code for rank in ranks] == [2, 2]
    assert "error: checkpoint.resume: run/checkpoint-2 belongs to another run" in ranks[0].stderr
    assert "\n  packing: True | None\n" in ranks[0].stderr


def test_too_few_rows(work: Path) -> None:
    ranks = launch(work, *set_words(["train.global_batch_size=64", "train.output_dir=none"]), num_ranks=1)
    assert ranks[0].exit_code == 2
    assert re.search(r"data\.train: got \d+ packed rows, expected at least one global batch of 64\.", ranks[0].stderr)


def test_a_bad_row_is_found_once(work: Path) -> None:
    """Both ranks end with the one message of the rank that has tokenized."""
    rows = [{"prompt": "Q", "completion": "A"}] * 20 + [{"prompt": "Q"}]
    (work / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    ranks = launch(work, *set_words(["data.train=bad.jsonl", "train.output_dir=none"]))
    assert [rank.exit_code for rank in ranks] == [2, 2]
    assert "bad.jsonl, line 21" in ranks[0].stderr and "line 21" not in ranks[1].stderr
