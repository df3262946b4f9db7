"""Plain text tables, at most 100 columns wide: one run at its end, and several runs side by side."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_ds.config.errors import UserError
from sparse_ds.monitor.metrics_log import read_metrics
from sparse_ds.monitor.summary import RunSummary

WIDTH = 100
_MAX_TEXT_LINES = 7
_MAX_NAME = 18
CONFIG_FILE = "resolved_config.json"
METRICS_FILE = "metrics.jsonl"
_SCORE_TITLES = {"accuracy": "accuracy", "f1": "F1", "f1_macro": "F1 (macro)", "matthews": "Matthews"}


def run_table(summary: RunSummary) -> str:
    """The table at the end of a run. A row is left out where the run has nothing to say."""
    peak = f"peak {summary.peak_memory_gib:.2f} GiB"
    skipped = f" ({summary.num_skipped_steps:,} skipped)" if summary.num_skipped_steps else ""
    rows: list[tuple[str, str | None]] = [
        ("held-out loss", _loss_change(summary)),
        *((f"held-out {title}", _score_change(summary, name)) for name, title in _SCORE_TITLES.items()),
        ("perplexity", _perplexity_change(summary)),
        *_task_rows(summary),
        (
            "trained weights",
            f"{summary.num_trained_weights:,} of {summary.num_weights:,} ({_percent(summary.trained_fraction)})",
        ),
        (
            "training",
            f"{summary.num_steps:,} steps{skipped} in {_duration(summary.wall_s)}, "
            f"{summary.tokens_per_second:,.0f} tokens/s{_utilization(summary)}, {peak}",
        ),
        ("sample prompt", summary.sample_prompt),
        ("answer before", summary.sample_answer_before),
        ("answer after", summary.sample_answer_after),
        ("expected answer", summary.reference_answer),
        ("adapter", summary.adapter_dir),
        ("merged model", summary.merged_dir),
    ]
    label_width = max(len(label) for label, text in rows if text is not None)
    rule = "-" * WIDTH
    lines = [rule]
    for label, text in rows:
        if text is None:
            continue
        is_path = label in ("adapter", "merged model")
        # A path stays on one line, whatever its length, so that it can be copied.
        texts = [text] if is_path else _wrapped(text, WIDTH - label_width - 2, keep_end=label == "sample prompt")
        lines += [f"{label if i == 0 else '':<{label_width}}  {part}".rstrip() for i, part in enumerate(texts)]
    return "\n".join([*lines, rule])


def compare_runs(run_folders: Sequence[Path | str]) -> str:
    """A table with one row a run, in the given order.

    "of full" is the share of the way that full fine-tuning goes, `(before - after) / (before_full - after_full)`,
    where one of the runs has the method `full` (of several, the one that goes furthest).

    Args:
        run_folders: output folders of runs, each with resolved_config.json and metrics.jsonl. A run that has not
            finished (no summary yet) gets a row without numbers.

    Raises:
        UserError: no run given, or a folder without these files.
    """
    if not run_folders:
        raise UserError("No run folder was given; expected at least one folder with a resolved_config.json.")
    runs = [_read_run(Path(folder), name) for folder, name in zip(run_folders, _names(run_folders), strict=True)]
    full_gains = [gain for run in runs if run.method == "full" and (gain := _gain(run.summary)) is not None]
    full_gain = max(full_gains, default=None)
    header = ["run", "method", "trained", "share", "before", "after", "of full", "tokens/s", "GiB"]
    rows = [_row(run, full_gain) for run in runs]
    scores = [(run.summary and run.summary.heldout_scores_after) or {} for run in runs]
    if any(scores):
        header[6:6] = ["right", "MCC"]
        for row, of_run in zip(rows, scores, strict=True):
            row[6:6] = [_score(of_run, "accuracy"), _score(of_run, "matthews")]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            f"{cell:<{width}}" if i < 2 else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()

    legend = "share: of all weights; before, after: held-out loss; of full: of full fine-tuning's improvement"
    if "right" in header:
        legend = f"{legend};\nright, MCC: held-out accuracy and Matthews' correlation after"
    return "\n".join([line(header), line(["-" * width for width in widths]), *(line(row) for row in rows), legend])


@dataclass(frozen=True)
class _Run:
    name: str
    method: str
    summary: RunSummary | None


def _read_run(folder: Path, name: str) -> _Run:
    config_path = folder / CONFIG_FILE
    try:
        method = json.loads(config_path.read_text(encoding="utf-8"))["method"]["name"]
    except OSError as error:
        raise UserError(
            f"Run folder '{folder}' has no readable '{CONFIG_FILE}' ({error.strerror}). Give a run's output folder."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{config_path}' is not the configuration of a run: it has no 'method.name'.") from error
    summaries = read_metrics(folder / METRICS_FILE, "summary")
    if not summaries:
        return _Run(name, method, None)
    try:
        return _Run(name, method, RunSummary.from_record(summaries[-1]))
    except KeyError as error:
        raise UserError(f"'{folder / METRICS_FILE}': the summary of the run has no field {error}.") from error


def _names(run_folders: Sequence[Path | str]) -> list[str]:
    """Folder names; with the parent's where two would be the same. Long ones keep their end."""
    paths = [Path(folder).resolve() for folder in run_folders]
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [f"{path.parent.name}/{path.name}" for path in paths]
    return [name if len(name) <= _MAX_NAME else ".." + name[-(_MAX_NAME - 2) :] for name in names]


def _row(run: _Run, full_gain: float | None) -> list[str]:
    summary = run.summary
    if summary is None:
        return [run.name, run.method, "unfinished", *["-"] * 6]
    gain = _gain(summary)
    of_full = "-" if gain is None or full_gain is None or full_gain <= 0 else f"{gain / full_gain:.1%}"
    return [
        run.name,
        run.method,
        f"{summary.num_trained_weights:,}",
        _percent(summary.trained_fraction),
        _loss(summary.heldout_loss_before),
        _loss(summary.heldout_loss_after),
        of_full,
        f"{summary.tokens_per_second:,.0f}",
        f"{summary.peak_memory_gib:.2f}",
    ]


def _gain(summary: RunSummary | None) -> float | None:
    """By how much the held-out loss fell, or None where it is not known."""
    if summary is None or summary.heldout_loss_before is None or summary.heldout_loss_after is None:
        return None
    gain = summary.heldout_loss_before - summary.heldout_loss_after
    return gain if math.isfinite(gain) else None


def _loss_change(summary: RunSummary) -> str | None:
    if summary.heldout_loss_before is None and summary.heldout_loss_after is None:
        return None
    return f"{_loss(summary.heldout_loss_before)} before, {_loss(summary.heldout_loss_after)} after"


def _score_change(summary: RunSummary, name: str) -> str | None:
    before, after = summary.heldout_scores_before or {}, summary.heldout_scores_after or {}
    if name not in before and name not in after:
        return None
    return f"{_score(before, name)} before, {_score(after, name)} after"


def _score(scores: Mapping[str, float], name: str) -> str:
    if name not in scores:
        return "-"
    return f"{scores[name]:.1%}" if name == "accuracy" else f"{scores[name]:.3f}"


def _perplexity_change(summary: RunSummary) -> str | None:
    before, after = summary.heldout_perplexity_before, summary.heldout_perplexity_after
    if before is None and after is None:
        return None
    shown = ["-" if value is None else f"{value:.4g}" for value in (before, after)]
    return f"{shown[0]} before, {shown[1]} after"


def _task_rows(summary: RunSummary) -> list[tuple[str, str | None]]:
    """One row a task: accuracy before and after, and what guessing would give."""
    rows: list[tuple[str, str | None]] = []
    for task in summary.tasks or []:
        before, after = (
            "-" if task[key] is None else f"{task[key]:.1%}" for key in ("accuracy_before", "accuracy_after")
        )
        guessing = "" if task["chance"] is None else f"; guessing {task['chance']:.1%}"
        text = f"{before} right before, {after} after ({task['num_samples']:,} questions{guessing})"
        rows.append((f"task {task['task']}"[:_MAX_NAME], text))
    return rows


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


def _percent(fraction: float) -> str:
    return f"{fraction * 100:.3g} %"


def _utilization(summary: RunSummary) -> str:
    if summary.mfu is None:
        return ""
    recomputed = "" if summary.hfu in (None, summary.mfu) else f" ({summary.hfu:.1%} with recomputation)"
    return f", {summary.mfu:.1%} of peak{recomputed}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _wrapped(text: str, width: int, *, keep_end: bool) -> list[str]:
    """Lines of at most `width`. Of too many, the last (`keep_end`: a question follows its preamble) or the first."""
    lines = [part for line in text.strip().splitlines() for part in textwrap.wrap(line, width) or [""]] or ["(empty)"]
    if len(lines) <= _MAX_TEXT_LINES:
        return lines
    if keep_end:
        return ["[...]", *lines[-(_MAX_TEXT_LINES - 1) :]]
    return [*lines[: _MAX_TEXT_LINES - 1], "[...]"]
