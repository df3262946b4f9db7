"""In a real run on one rank the deltas are held for each micro batch: the same run, with fewer writes into the base."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

from sparse_ds.config.schema import RunConfig
from sparse_ds.distributed.launch_environment import complete_environment
from sparse_ds.embedded import resolve_data
from sparse_ds.sparse import held_deltas, sparse_linear
from sparse_ds.training import run as run_module

NUM_STEPS, ACCUMULATION, NUM_LAYERS = 4, 2, 4 * 7


def train(folder: Path, checkpointing: bool, holds: bool) -> dict[str, Any]:
    """Losses, index hashes, adapter, and how often deltas went into a weight, by who put them there."""
    puts = {"held": 0, "for a product": 0}
    plain = sparse_linear.deltas_applied

    def counted(name: str) -> Any:
        def applied(*args: Any) -> Any:
            puts[name] += 1
            return plain(*args)

        return applied

    output = folder / f"run_{holds}_{os.environ['WORLD_SIZE']}"
    settings = {
        "model": {"quantization": "none"},
        "data": {"train": str(folder / "rows.jsonl"), "eval": None, "sequence_length": 64},
        "method": {"name": "sft_ag", "density": 0.02, "interval_steps": 2, "estimation_steps": 1},
        "optimizer": {"learning_rate": 0.003},
        "train": {
            "output_dir": str(output),
            "max_steps": NUM_STEPS,
            "micro_batch_size": 4 // int(os.environ["WORLD_SIZE"]),
            "gradient_accumulation_steps": ACCUMULATION,
            "gradient_checkpointing": checkpointing,
        },
        "export": {"merged": False},
        "monitor": {"progress_bar": False, "num_sample_prompts": 0},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_linear, "deltas_applied", counted("for a product"))
        patch.setattr(held_deltas, "deltas_applied", counted("held"))
        if not holds:
            patch.setattr(run_module, "layers_that_can_hold", lambda layers, device: [])
        run_module.run(RunConfig.model_validate(settings), complete_environment(os.environ), "cpu")
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "puts": puts,
        "losses": [record["loss"] for record in records if record["kind"] == "step"],
        "hashes": [record["index_hash"] for record in records if record["kind"] == "event"],
        "adapter": hashlib.sha256((output / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest(),
    }


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_same_run(checkpointing: bool, tmp_path: Path) -> None:
    rows = Path(resolve_data("embedded:train")).read_text(encoding="utf-8").splitlines(keepends=True)[:40]
    (tmp_path / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    (held,) = run_ranks(1, train, tmp_path, checkpointing, True, join_group=False)
    (put,) = run_ranks(1, train, tmp_path, checkpointing, False, join_group=False)
    num_micro_batches = NUM_STEPS * ACCUMULATION
    assert held.pop("puts") == {"held": num_micro_batches * NUM_LAYERS, "for a product": 0}
    # Forward and backward, or forward, forward again and backward. q, k and v of the first block need no gradient of
    # their input.
    per_micro_batch = NUM_LAYERS * (3 if checkpointing else 2) - 3
    assert put.pop("puts") == {"held": 0, "for a product": num_micro_batches * per_micro_batch}
    assert len(held["hashes"]) == 2 and len(held["losses"]) == NUM_STEPS
    assert held == put


@pytest.mark.slow
def test_several_ranks_put_them_in_for_every_product(tmp_path: Path) -> None:
    rows = Path(resolve_data("embedded:train")).read_text(encoding="utf-8").splitlines(keepends=True)[:40]
    (tmp_path / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    for found in run_ranks(2, train, tmp_path, False, True, join_group=False):
        assert found["puts"]["held"] == 0 and found["puts"]["for a product"] > 0
