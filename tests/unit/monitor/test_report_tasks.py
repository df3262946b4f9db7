"""Perplexity and tasks in the summary and in the table at the end of a run."""

from __future__ import annotations

import math
from typing import Any

from sparse_ds.monitor.report import run_table
from sparse_ds.monitor.summary import RunSummary, perplexity

TASK = {"task": "piqa", "num_samples": 1338, "accuracy_before": 0.5, "accuracy_after": 0.625, "chance": 0.5}


def summary(**changes: Any) -> RunSummary:
    fields: dict[str, Any] = {
        "heldout_loss_before": math.log(8.0),
        "heldout_loss_after": math.log(2.0),
        "num_trained_weights": 10,
        "num_weights": 1000,
        "num_steps": 5,
        "wall_s": 1.0,
        "tokens_per_second": 100.0,
        "peak_memory_gib": 0.5,
        **dict.fromkeys(
            ("index_hash", "sample_prompt", "sample_answer_before", "sample_answer_after", "reference_answer")
        ),
        "adapter_dir": None,
        "merged_dir": None,
    }
    return RunSummary(**{**fields, **changes})


def rows(table: str) -> dict[str, str]:
    """Label -> text of the rows of a table."""
    pairs = (line.split("  ", 1) for line in table.splitlines() if "  " in line)
    return {label: text.strip() for label, text in pairs}


def test_perplexity() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(1e6) == math.inf
    record = summary().to_record()
    assert math.isclose(record["heldout_perplexity_before"], 8.0)
    assert math.isclose(record["heldout_perplexity_after"], 2.0)
    assert rows(run_table(summary()))["perplexity"] == "8 before, 2 after"
    assert RunSummary.from_record(record) == summary()
    without = summary(heldout_loss_before=None, heldout_loss_after=None)
    assert without.to_record()["heldout_perplexity_after"] is None
    assert "perplexity" not in run_table(without)


def test_tasks() -> None:
    given = summary(tasks=[TASK, {**TASK, "task": "gsm8k", "accuracy_before": None, "chance": None}])
    shown = rows(run_table(given))
    assert shown["task piqa"] == "50.0% right before, 62.5% after (1,338 questions; guessing 50.0%)"
    assert shown["task gsm8k"] == "- right before, 62.5% after (1,338 questions)"
    assert RunSummary.from_record(given.to_record()) == given
    assert "task" not in run_table(summary())
