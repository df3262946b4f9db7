"""The benchmarks run as a user types them, on a tiny model, and their JSON holds what their tables show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--shape", "tiny", "--layers", "2", "--tokens", "2x16", "--densities", "0.02"]


def test_bench_step(tmp_path: Path) -> None:
    rows = ["floor", "sft_ag", "sft_ma", "lora_0.1"]
    options = ["--rows", *rows, "--rounds", "1", "--dtype", "nf4", "--checkpointing", "--profile"]
    output, content = _run([sys.executable, "scripts/bench_step.py"], options, tmp_path)
    assert [row["name"] for row in content["rows"]] == rows
    assert set(content["rows"][1]["wall_ms"]) == {"step", "first estimation step", "estimation step", "event"}
    for label in ("SFT-AG, all included", "SFT-MA: event", "LoRA, dropout 0.1"):
        assert output.count(f"| {label} |") == 1
    assert "| values' gradient |" in output


@pytest.mark.slow
def test_bench_memory(tmp_path: Path) -> None:
    options = ["--rows", "floor", "sft_ag", "lora_0"]
    output, content = _run([sys.executable, "scripts/bench_memory.py"], options, tmp_path)
    floor, sft_ag, lora = content["rows"]
    assert 0 <= floor["resident_bytes"] < 1000
    # An AdamW of fp32 weights holds three numbers of 4 bytes for each between two steps.
    assert 12 * lora["num_trained"] <= lora["resident_bytes"] < 13 * lora["num_trained"] + 10_000
    assert sft_ag["resident_bytes"] >= 16 * sft_ag["num_trained"]
    assert sft_ag["everything_bytes"] >= sft_ag["step_bytes"] > sft_ag["resident_bytes"]
    assert output.count("| bfloat16 | off |") == 3


@pytest.mark.slow
def test_bench_step_on_two_ranks(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--zero3", "--rounds", "1"]
    _, content = _run([*launch, "scripts/bench_step.py"], options, tmp_path)
    assert content["num_ranks"] == 2
    names = {row["name"] for row in content["rows"]}
    assert names == {"floor", "sparta", "sft_ag", "sft_ma", "sparta_compiled", "lora_0", "lora_0.1", "full"}


@pytest.mark.slow
def test_bench_events_on_two_ranks(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    output, content = _run([*launch, "scripts/bench_events.py"], ["--rounds", "1", "--rows", "sft_ag"], tmp_path)
    (row,) = content["rows"]
    counts = row["counts"]
    # One matrix is one tile here; what is chosen, and what an event moves, goes in one message for all 14 matrices.
    assert counts["step"] == {}
    assert {name: calls for name, (calls, _) in counts["first estimation step"].items()} == {
        "all_reduce": 7,
        "all_gather_into_tensor": 1,
        "reduce_scatter_tensor": 15,
    }
    assert counts["event"]["all_gather_into_tensor"][0] == 1
    assert "| SFT-AG | event |" in output


def _run(command: list[str], options: list[str], folder: Path) -> tuple[str, Any]:
    file = folder / "result.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, *TINY, *options, "--json", str(file)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout, json.loads(file.read_text())
