"""The main job (NF4 base, bf16) on one rank, on two, on two again: the same run up to rounding, and the same run.

The losses of 25 steps and three events; `tests/parity/test_dense_oracle.py` does the same in fp32, to the last digits.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from finished_runs import FinishedRun, index_overlap
from forks import free_port

from sparse_ds.embedded import resolve_model
from sparse_ds.export.quantized import write_nf4_checkpoint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 25
LAUNCH_SECONDS = 300
SETTINGS = {
    "train.max_steps": NUM_STEPS,
    # The same samples in the same micro batches on any number of ranks: 4 of them on one rank, 2 on each of two.
    "train.micro_batch_size": 2,
    "train.global_batch_size": 8,
    "train.device": '"cpu"',
    "train.cpu_threads": 1,
    "data.num_eval_samples": 16,
    "method.interval_steps": 8,
    "method.estimation_steps": 3,
    "export.merged": "false",
    "monitor.num_sample_prompts": 0,
    "monitor.progress_bar": "false",
}


def launch(num_ranks: int, folder: Path, model: str | Path = "embedded") -> FinishedRun:
    """`python` for one rank, `deepspeed --num_accelerators N` for several."""
    launcher = [sys.executable]
    if num_ranks > 1:
        deepspeed = str(Path(sys.executable).with_name("deepspeed"))
        launcher = [deepspeed, "--num_accelerators", str(num_ranks), "--master_port", str(free_port())]
    settings = {**SETTINGS, "model.name_or_path": model, "train.output_dir": folder / "run"}
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command = [*launcher, str(ROOT / "launcher" / "train.py"), "--config", "zero3_sft_ma.json", *overrides]
    # The `deepspeed` command starts `python` by its own path, and DeepSpeed's accelerator follows this variable.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    folder.mkdir()
    ended = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=LAUNCH_SECONDS, env=environment, check=False
    )
    assert ended.returncode == 0, f"{command}\n{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}"
    return FinishedRun.read(folder / "run")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FinishedRun]:
    """Two launches at a time: their imports are the larger part."""
    folder = tmp_path_factory.mktemp("world_sizes")
    in_nf4 = folder / "model_in_nf4"
    write_nf4_checkpoint(resolve_model("embedded"), in_nf4)
    with ThreadPoolExecutor(max_workers=2) as pool:
        futures = {
            name: pool.submit(launch, num_ranks, folder / name, model)
            for name, num_ranks, model in (
                ("two", 2, "embedded"),
                ("two_again", 2, "embedded"),
                ("one", 1, "embedded"),
                ("two_in_nf4", 2, in_nf4),
            )
        }
        return {name: future.result() for name, future in futures.items()}


def test_two_ranks_train_as_one_does(runs: dict[str, FinishedRun]) -> None:
    one, two = runs["one"], runs["two"]
    assert len(one.losses) == NUM_STEPS
    assert two.losses == pytest.approx(one.losses, rel=0, abs=1e-2)
    assert two.index_hashes.keys() == one.index_hashes.keys() == {3, 11, 19}
    assert index_overlap(one, two) >= 0.99
    assert two.summary["heldout_loss_after"] == pytest.approx(one.summary["heldout_loss_after"], rel=0, abs=1e-2)
    assert one.summary["heldout_loss_after"] < one.summary["heldout_loss_before"] - 0.1, "the run must have moved"


@pytest.mark.parametrize("other", ["two_again", "two_in_nf4"])
def test_a_run_is_repeated_bit_for_bit(runs: dict[str, FinishedRun], other: str) -> None:
    """Also from the base that was saved in NF4 before."""
    first, second = runs["two"], runs[other]
    assert first.losses == second.losses
    assert first.index_hashes == second.index_hashes
    assert first.adapter.keys() == second.adapter.keys()
    assert all(tensor.equal(second.adapter[name]) for name, tensor in first.adapter.items())


def test_every_rank_reads_its_share_of_the_base(runs: dict[str, FinishedRun]) -> None:
    (one,), (two,), (in_nf4,) = (runs[name].of_kind("load") for name in ("one", "two", "two_in_nf4"))
    assert one["ranks"][0]["bytes_read"] == one["bytes"] == two["bytes"]
    assert [record["rank"] for record in two["ranks"]] == [0, 1]
    for record in two["ranks"]:
        assert record["bytes_read"] <= 0.55 * two["bytes"] and record["wall_s"] > 0 < record["peak_memory_gib"]
    assert in_nf4["bytes"] < 0.5 * two["bytes"]
