"""A classification of every sparse method on two ranks: the base stays as it is, bit for bit, and the head moves."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from partition_probe import hash_base
from ranks import run_ranks
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_ds.config.schema import RunConfig
from sparse_ds.distributed.launch_environment import complete_environment
from sparse_ds.distributed.zero3_partitions import local_partition
from sparse_ds.training import run as run_module
from sparse_ds.training.trainer import SparseTrainer

METHODS: dict[str, dict[str, Any]] = {
    "sparta": {"name": "sparta"},
    "sparta_with_norms": {"name": "sparta", "train_norms": True},
    "sft_ma": {"name": "sft_ma"},
    "sft_ag": {"name": "sft_ag"},
}
NUM_STEPS = 7


def train_and_hash(settings: dict[str, Any]) -> dict[str, Any]:
    """A run of this rank: hashes of the base before and after, and how far the head and the values moved."""
    seen: dict[str, Any] = {}

    class HashingTrainer(SparseTrainer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            seen["before"], seen["head"] = hash_base(self.model), head(self)
            self.add_callback(HashAtEnd(self))

    class HashAtEnd(TrainerCallback):
        def __init__(self, trainer: SparseTrainer) -> None:
            self._trainer = trainer

        def on_step_end(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
        ) -> None:
            gathered = [name for name, p in self._trainer.model.named_parameters() if p.data.numel() > 0]
            assert not gathered, f"{gathered} stay gathered after step {state.global_step}"

        def on_train_end(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
        ) -> None:
            trainer = self._trainer
            seen["after"], seen["num_steps"] = hash_base(trainer.model), state.global_step
            seen["num_moved"] = int((head(trainer) != seen.pop("head")).sum())
            trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
            seen["dtypes"] = {str(p.ds_tensor.dtype) for p in trained.values()}
            seen["num_values"] = sum(
                int(local_partition(p).count_nonzero()) for name, p in trained.items() if name.endswith(".values")
            )

    def head(trainer: SparseTrainer) -> torch.Tensor:
        return local_partition(trainer.model.score.weight).clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "SparseTrainer", HashingTrainer)
        run_module.run(RunConfig.model_validate(settings), complete_environment(os.environ), "cpu")
    return seen


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("method", METHODS)
def test_the_base_stays_bit_for_bit(tmp_path: Path, tiny_base: Path, method: str, quantization: str) -> None:
    rows = [{"text": f"the {word} is number {number}", "label": word} for number in range(8) for word in ("dog", "key")]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {
        "model": {"name_or_path": str(tiny_base), "task": "sequence_classification", "quantization": quantization},
        "data": {"train": str(data), "eval": None},
        "method": {**METHODS[method], "density": 0.05},
        "optimizer": {"learning_rate": 0.01},
        "train": {
            "output_dir": str(tmp_path / "run"),
            "max_steps": NUM_STEPS,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "cpu_threads": 1,
            "gradient_checkpointing": METHODS[method].get("train_norms", False),
        },
        "export": {"merged": False},
        "monitor": {"progress_bar": False},
    }
    for seen in run_ranks(2, train_and_hash, settings, join_group=False):
        assert seen["num_steps"] == NUM_STEPS
        assert seen["after"] == seen["before"]
        assert seen["dtypes"] == {"torch.float32"}
        assert seen["num_moved"] > 0 and seen["num_values"] > 0
