"""In a real run the layers of one input share its transpose: under ZeRO-3's hooks, with checkpointing and without."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

from sparse_ds.config.schema import RunConfig
from sparse_ds.distributed.launch_environment import complete_environment
from sparse_ds.embedded import resolve_data
from sparse_ds.kernels import product_operands
from sparse_ds.training import run as run_module

NUM_STEPS, NUM_BLOCKS, HIDDEN, INTERMEDIATE, KEYS = 3, 4, 128, 352, 64
PER_BLOCK = Counter(
    {
        # dY^T of q, o, down; of k, v; of gate, up. X^T of q/k/v, of o, of gate/up; of down.
        HIDDEN: 3 + 3,
        KEYS: 2,
        INTERMEDIATE: 2 + 1,
    }
)
"""Copies by the width of what is transposed, for the embedded model."""


def count_copies(folder: Path, checkpointing: bool) -> tuple[dict[int, int], int]:
    """(copies by width, transposes that were left over) of a run of three micro batches on this rank."""
    made: Counter[int] = Counter()
    left: list[Any] = []
    plain, plain_init = product_operands.transposed, product_operands._SharedInput.__init__

    def counted(matrix: torch.Tensor) -> torch.Tensor:
        made[matrix.shape[1]] += 1
        return plain(matrix)

    def noted(self: Any) -> None:
        plain_init(self)
        left.append(self)

    settings = {
        "model": {"quantization": "none"},
        "data": {"train": str(folder / "rows.jsonl"), "eval": None, "sequence_length": 128},
        "method": {"name": "sparta", "density": 0.01},
        "optimizer": {"learning_rate": 0.001},
        "train": {
            "output_dir": str(folder / "run"),
            "max_steps": NUM_STEPS,
            "gradient_checkpointing": checkpointing,
            "values_gradient": "sampled",
        },
        "export": {"merged": False},
        "monitor": {"progress_bar": False, "num_sample_prompts": 0},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(product_operands, "transposed", counted)
        patch.setattr(product_operands._SharedInput, "__init__", noted)
        run_module.run(RunConfig.model_validate(settings), complete_environment(os.environ), "cpu")
    return dict(made), sum(shared.transposed_IT is not None for shared in left)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_input_is_transposed_once(checkpointing: bool, tmp_path: Path) -> None:
    rows = Path(resolve_data("embedded:train")).read_text(encoding="utf-8").splitlines(keepends=True)[:40]
    (tmp_path / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    for made, num_left in run_ranks(2, count_copies, tmp_path, checkpointing, join_group=False):
        assert made == {width: NUM_STEPS * NUM_BLOCKS * number for width, number in PER_BLOCK.items()}
        assert num_left == 0, "transposes outlive their backward"
