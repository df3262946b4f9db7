"""A run of 14 steps that several files of tests go on from."""

from __future__ import annotations

from pathlib import Path

import pytest
from finished_runs import FinishedRun
from forks import train_in_forks

from sparse_ds.embedded import resolve_data

NUM_ROWS, GLOBAL_BATCH_SIZE = 100, 16
"""6 steps an epoch, with 4 samples left over."""
NUM_STEPS = 14
RUN_ARGUMENTS = (
    "--config",
    "zero3_sft_ma",
    *(
        word
        for setting in (
            "data.train=rows.jsonl",
            "data.num_eval_samples=16",
            # Events after steps 2, 7 and 12.
            "method.interval_steps=5",
            "method.estimation_steps=2",
            f"train.max_steps={NUM_STEPS}",
            "train.micro_batch_size=4",
            f"train.global_batch_size={GLOBAL_BATCH_SIZE}",
            "train.output_dir=run",
            "train.cpu_threads=1",
            "checkpoint.interval_steps=2",
            "checkpoint.keep=5",
            "export.merged=false",
            "monitor.progress_bar=false",
            "monitor.num_sample_prompts=0",
        )
        for word in ("--set", setting)
    ),
)
"""The command line of `checkpointed_run`."""


def save_rows(folder: Path, num_rows: int = NUM_ROWS) -> Path:
    """The first rows of the embedded training data as `rows.jsonl` in a folder."""
    source = Path(resolve_data("embedded:train")).read_text(encoding="utf-8")
    path = folder / "rows.jsonl"
    path.write_text("".join(source.splitlines(keepends=True)[:num_rows]), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def checkpointed_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Two ranks, with the checkpoints of steps 6, 8, 10, 12 and 14. Go on from it in a copy: it is shared."""
    folder = tmp_path_factory.mktemp("checkpointed") / "work"
    folder.mkdir()
    save_rows(folder)
    ranks = train_in_forks([RUN_ARGUMENTS] * 2, [folder] * 2)
    assert [rank.exit_code for rank in ranks] == [0, 0], ranks
    return FinishedRun.read(folder / "run")
