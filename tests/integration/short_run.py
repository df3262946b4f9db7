"""The command line of a run of 14 steps on a hundred rows of the embedded data."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sparse_ds.embedded import resolve_data

NUM_ROWS, GLOBAL_BATCH_SIZE = 100, 16
"""6 steps an epoch, with 4 samples left over."""
NUM_STEPS = 14


def set_words(settings: Iterable[str]) -> list[str]:
    """`--set` before each setting."""
    return [word for setting in settings for word in ("--set", setting)]


RUN_ARGUMENTS = (
    "--config",
    "zero3_sft_ma",
    *set_words(
        [
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
            "monitor.peak_tflops=0.05",
            "monitor.num_sample_prompts=0",
        ]
    ),
)


def save_rows(folder: Path, num_rows: int = NUM_ROWS) -> Path:
    """The first rows of the embedded training data as `rows.jsonl` in a folder."""
    source = Path(resolve_data("embedded:train")).read_text(encoding="utf-8")
    path = folder / "rows.jsonl"
    path.write_text("".join(source.splitlines(keepends=True)[:num_rows]), encoding="utf-8")
    return path
