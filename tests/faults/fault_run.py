"""The run that the fault tests disturb: 10 short steps, events after steps 2, 5 and 8, a checkpoint after every second.

What a test does to it happens in real processes and real files. Where a moment has to be met, a rank is told before its
start (`prepare`) to leave a mark in the working folder when it gets there.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from finished_runs import FinishedRun
from forks import Ended, Rank, start_in_forks, wait_for
from safetensors.torch import load_file, save_file
from short_run import save_rows, set_words

from sparse_ds.embedded import resolve_model

NUM_STEPS, EVENT_STEPS = 10, (2, 5, 8)
GLOBAL_BATCH_SIZE = 8
STALL_TIMEOUT_S = 5.0
ADAPTER = Path("adapter") / "adapter_model.safetensors"
ARGUMENTS = (
    "--config",
    "zero3_sft_ma",
    *set_words(
        [
            "model.name_or_path=model",
            "data.train=rows.jsonl",
            "data.num_eval_samples=4",
            "method.interval_steps=3",
            "method.estimation_steps=2",
            f"train.max_steps={NUM_STEPS}",
            "train.micro_batch_size=4",
            f"train.global_batch_size={GLOBAL_BATCH_SIZE}",
            "train.output_dir=run",
            "train.cpu_threads=1",
            f"train.stall_timeout_s={STALL_TIMEOUT_S}",
            "checkpoint.interval_steps=2",
            "checkpoint.keep=10",
            "export.merged=false",
            "monitor.progress_bar=false",
            "monitor.num_sample_prompts=0",
        ]
    ),
)
RESUME = ("--resume", "auto")
NUM_ROWS = 50
"""6 steps an epoch, with 2 samples left over."""


def prepare_work(folder: Path) -> Path:
    """The data, and the first block of the embedded model as `model`: a quarter of the collectives."""
    folder.mkdir()
    save_rows(folder, NUM_ROWS)
    shutil.copytree(resolve_model("embedded"), folder / "model")
    config = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))
    (folder / "model" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}), encoding="utf-8")
    weights = folder / "model" / "model.safetensors"
    block = re.compile(r"model\.layers\.[1-9]")
    tensors = {name: tensor for name, tensor in load_file(weights).items() if not block.match(name)}
    save_file(tensors, weights, metadata={"format": "pt"})
    return folder


def start_run(work: Path, *words: str, num_ranks: int = 2, prepare: Callable[[], None] | None = None) -> list[Rank]:
    """Start the run in `work`, with further words of the command line."""
    return start_in_forks([[*ARGUMENTS, *words]] * num_ranks, [work] * num_ranks, prepare=prepare)


def carry_out(work: Path, *words: str, num_ranks: int = 2, output: str = "run") -> tuple[FinishedRun, list[Ended]]:
    """The run from its start, or with RESUME from where it is, to its end."""
    ended = wait_for(start_run(work, *words, num_ranks=num_ranks))
    assert [rank.exit_code for rank in ended] == [0] * num_ranks, ended
    return FinishedRun.read(work / output), ended


def go_on(work: Path, *words: str, num_ranks: int = 2) -> tuple[FinishedRun, list[Ended]]:
    """Resume from the newest checkpoint, or begin anew where there is none yet."""
    return carry_out(work, *words, *RESUME, num_ranks=num_ranks)


def wait_until(condition: Callable[[], bool], ranks: Sequence[Rank], timeout_s: float = 90.0) -> None:
    """Look often; fails the test when the time is over, or a rank ends before."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline or not all(rank.process.is_alive() for rank in ranks):
            texts = [rank.stdout + rank.stderr for rank in ranks]
            for rank in ranks:
                rank.process.kill()
            pytest.fail(f"the moment to disturb the run has not come: {texts}", pytrace=False)
        time.sleep(0.002)


def metrics_of(work: Path, output: str = "run") -> list[dict[str, Any]]:
    """The whole lines so far."""
    path = work / output / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def has_done(work: Path, step: int, output: str = "run") -> bool:
    """Whether the line of a step has been written."""
    return any(record["kind"] == "step" and record["step"] >= step for record in metrics_of(work, output))


def kill(ranks: Sequence[Rank]) -> None:
    """SIGKILL, and wait for the end."""
    for rank in ranks:
        rank.process.kill()
    for rank in ranks:
        rank.process.join()


def assert_same_run(run: FinishedRun, expected: FinishedRun) -> None:
    """Bit for bit: every loss, every event, the adapter; one line a step."""
    assert [record["step"] for record in run.of_kind("step")] == list(expected.losses)
    assert run.losses == expected.losses
    assert run.index_hashes == expected.index_hashes
    assert (run.folder / ADAPTER).read_bytes() == (expected.folder / ADAPTER).read_bytes()
    for field in ("heldout_loss_before", "heldout_loss_after", "index_hash", "num_steps", "num_skipped_steps"):
        assert run.summary[field] == expected.summary[field], field
