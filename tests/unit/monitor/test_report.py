"""The tables a user reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparse_ds.config.errors import UserError
from sparse_ds.monitor.metrics_log import MetricsLog, read_metrics
from sparse_ds.monitor.report import compare_runs, run_table
from sparse_ds.monitor.summary import RunSummary

SUMMARY = RunSummary(
    heldout_loss_before=5.2,
    heldout_loss_after=4.3,
    num_trained_weights=12_345,
    num_weights=1_000_000,
    num_steps=150,
    wall_s=83.2,
    tokens_per_second=3692.4,
    peak_memory_gib=1.234,
    index_hash="ab" * 32,
    sample_prompt="Reverse: abc",
    sample_answer_before="I do not know",
    sample_answer_after="cba",
    reference_answer="cba",
    adapter_dir="outputs/run/adapter",
    merged_dir="outputs/run/merged",
)


def write_run(folder: Path, method: str, summary: RunSummary | None, **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "resolved_config.json").write_text(json.dumps({"method": {"name": method}, **config}))
    with MetricsLog(folder / "metrics.jsonl") as log:
        log.write("step", {"step": 1})
        if summary is not None:
            log.write("summary", summary.to_record())
    return folder


def test_skipped_steps_are_in_the_table() -> None:
    assert "150 steps (3 skipped) in 1 min 23 s, " in run_table(replace(SUMMARY, num_skipped_steps=3))


def test_utilization_is_in_the_table() -> None:
    used = replace(SUMMARY, tflops_per_rank=120.0, mfu=0.3846, hfu=0.3846)
    assert "3,692 tokens/s, 38.5% of peak, peak 1.23 GiB" in run_table(used)
    table = run_table(replace(used, hfu=0.5))
    assert "3,692 tokens/s, 38.5% of peak (50.0% with recomputation), peak" in " ".join(table.split())


def test_run_table() -> None:
    table = run_table(SUMMARY)
    assert table == "\n".join(
        [
            "-" * 100,
            "held-out loss    5.2000 before, 4.3000 after",
            "perplexity       181.3 before, 73.7 after",
            "trained weights  12,345 of 1,000,000 (1.23 %)",
            "training         150 steps in 1 min 23 s, 3,692 tokens/s, peak 1.23 GiB",
            "sample prompt    Reverse: abc",
            "answer before    I do not know",
            "answer after     cba",
            "expected answer  cba",
            "adapter          outputs/run/adapter",
            "merged model     outputs/run/merged",
            "-" * 100,
        ]
    )


def test_rows_without_content_are_left_out() -> None:
    nothing = replace(
        SUMMARY,
        heldout_loss_before=None,
        heldout_loss_after=None,
        sample_prompt=None,
        sample_answer_before=None,
        sample_answer_after=None,
        reference_answer=None,
        adapter_dir=None,
        merged_dir=None,
    )
    labels = [line[:15].strip() for line in run_table(nothing).splitlines()[1:-1]]
    assert labels == ["trained weights", "training"]


def test_long_and_multi_line_answers_are_wrapped_and_cut() -> None:
    table = run_table(replace(SUMMARY, sample_answer_after="first\n\n" + "word " * 300, sample_answer_before=" \n"))
    lines = table.splitlines()
    assert max(map(len, lines)) == 100
    start = next(i for i, line in enumerate(lines) if line.startswith("answer after"))
    assert lines[start] == "answer after     first"
    assert lines[start + 1] == ""
    assert lines[start + 2].startswith(" " * 17 + "word word")
    assert lines[start + 6].strip() == "[...]"
    assert lines[start + 7].startswith("expected answer")
    assert "answer before    (empty)" in lines


def test_a_long_prompt_keeps_its_end() -> None:
    table = run_table(replace(SUMMARY, sample_prompt="preamble " * 200 + "\n\nWhat is asked?"))
    lines = table.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("sample prompt"))
    assert lines[start] == "sample prompt    [...]"
    assert lines[start + 6].strip() == "What is asked?"
    assert lines[start + 7].startswith("answer before")


def test_a_long_path_stays_whole() -> None:
    path = "/" + "x" * 150
    assert path in run_table(replace(SUMMARY, merged_dir=path))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(9.96, "in 10.0 s,"), (59.9, "in 59.9 s,"), (3599.6, "in 1 h 00 min,"), (100_000, "in 27 h 46 min,")],
)
def test_durations(seconds: float, text: str) -> None:
    assert text in run_table(replace(SUMMARY, wall_s=seconds))


def test_summary_survives_the_file(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "sft_ma", SUMMARY)
    (record,) = read_metrics(folder / "metrics.jsonl", "summary")
    assert record["trained_fraction"] == 0.012345
    assert RunSummary.from_record(record) == SUMMARY


def test_a_summary_with_nan_survives_the_file(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "sft_ma", replace(SUMMARY, heldout_loss_after=float("nan")))
    (record,) = read_metrics(folder / "metrics.jsonl", "summary")
    assert record["heldout_loss_after"] is None
    assert "5.2000 before, nan after" in run_table(RunSummary.from_record(record))


def test_compare_runs(tmp_path: Path) -> None:
    sparse = write_run(tmp_path / "sparse", "sft_ma", SUMMARY)
    full = write_run(
        tmp_path / "dense", "full", replace(SUMMARY, heldout_loss_after=3.7, num_trained_weights=1_000_000)
    )
    worse_full = write_run(tmp_path / "dense_short", "full", replace(SUMMARY, heldout_loss_after=5.0))
    running = write_run(tmp_path / "running", "sft_ma", None)
    assert compare_runs([sparse, full, worse_full, running]) == "\n".join(
        [
            "run          method     trained   share  before   after  of full  tokens/s   GiB",
            "-----------  ------  ----------  ------  ------  ------  -------  --------  ----",
            "sparse       sft_ma      12,345  1.23 %  5.2000  4.3000    60.0%     3,692  1.23",
            "dense        full     1,000,000   100 %  5.2000  3.7000   100.0%     3,692  1.23",
            "dense_short  full        12,345  1.23 %  5.2000  5.0000    13.3%     3,692  1.23",
            "running      sft_ma  unfinished       -       -       -        -         -     -",
            "share: of all weights; before, after: held-out loss; of full: of full fine-tuning's improvement",
        ]
    )


@pytest.mark.parametrize("after_full", [5.2, 6.0, None, float("nan")])
def test_share_of_full_needs_a_full_run_that_improved(tmp_path: Path, after_full: float | None) -> None:
    sparse = write_run(tmp_path / "sparse", "sft_ma", SUMMARY)
    full = write_run(tmp_path / "full", "full", replace(SUMMARY, heldout_loss_after=after_full))
    row = compare_runs([sparse, full]).splitlines()[2]
    assert row.split()[-3] == "-"


def test_the_last_summary_counts(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "sft_ma", SUMMARY)
    with MetricsLog(folder / "metrics.jsonl") as log:
        log.write("summary", replace(SUMMARY, heldout_loss_after=1.25).to_record())
    assert "1.2500" in compare_runs([folder])


def test_table_of_large_runs_fits(tmp_path: Path) -> None:
    large = replace(SUMMARY, num_trained_weights=68_976_648_192, num_weights=68_976_648_192, peak_memory_gib=639.99)
    folders = [write_run(tmp_path / f"a_rather_long_name_of_a_run_{i}", "sft_ma", large) for i in range(2)]
    folders.append(write_run(tmp_path / "full_run_of_long_name", "full", large))
    lines = compare_runs(folders).splitlines()
    assert max(map(len, lines)) <= 100
    names = [line.split()[0] for line in lines[2:5]]
    assert names == [".._name_of_a_run_0", ".._name_of_a_run_1", "..run_of_long_name"]


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / parent / "run", "sft_ma", SUMMARY) for parent in ("a", "b")]
    assert [line.split()[0] for line in compare_runs(folders).splitlines()[2:4]] == ["a/run", "b/run"]


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No run folder was given"):
        compare_runs([])
    with pytest.raises(UserError, match=r"nowhere' has no readable 'resolved_config\.json' \(No such file"):
        compare_runs([tmp_path / "nowhere"])
    (tmp_path / "resolved_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"it has no 'method\.name'"):
        compare_runs([tmp_path])
    (tmp_path / "resolved_config.json").write_text('{"method": {"name": "full"}}')
    with pytest.raises(UserError, match=r"metrics\.jsonl' cannot be read"):
        compare_runs([tmp_path])
    (tmp_path / "metrics.jsonl").write_text('{"kind": "summary"}\n')
    with pytest.raises(UserError, match="the summary of the run has no field 'heldout_loss_before'"):
        compare_runs([tmp_path])


def test_scores_of_a_classification(tmp_path: Path) -> None:
    classifier = replace(
        SUMMARY,
        heldout_scores_before={"accuracy": 0.5, "f1_macro": 0.4, "matthews": 0.0},
        heldout_scores_after={"accuracy": 0.93, "f1_macro": 0.9251, "matthews": 0.86},
    )
    shown = run_table(classifier).splitlines()
    assert "held-out accuracy    50.0% before, 93.0% after" in shown
    assert "held-out F1 (macro)  0.400 before, 0.925 after" in shown
    assert "held-out Matthews    0.000 before, 0.860 after" in shown
    assert not any("F1 " in line and "macro" not in line for line in shown), "F1 is that of two labels"
    folders = [write_run(tmp_path / "a", "sparta", classifier), write_run(tmp_path / "b", "full", SUMMARY)]
    header, _, first, second, *_ = compare_runs(folders).splitlines()
    assert header.split()[5:8] == ["after", "right", "MCC"]
    assert {"93.0%", "0.860"} < set(first.split()) and not {"93.0%", "0.860"} & set(second.split())
    assert all(len(line) <= 100 for line in compare_runs(folders).splitlines())
    record = classifier.to_record()
    assert RunSummary.from_record(record) == classifier
    del record["heldout_scores_before"], record["heldout_scores_after"]
    assert record["heldout_accuracy_before"] == 0.5 and record["heldout_accuracy_after"] == 0.93
    older = RunSummary.from_record(record)
    assert older.heldout_scores_after == {"accuracy": 0.93}, "a record of a time when accuracy was the only score"
    del record["heldout_accuracy_before"], record["heldout_accuracy_after"]
    assert RunSummary.from_record(record) == SUMMARY, "a record of a time before there were classifications"
