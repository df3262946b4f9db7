"""TIES and linear merging of adapters that hold every weight, against peft's functions on dense matrices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft.utils.merge_utils import task_arithmetic, ties

from sparse_ds.adapter.adapter import Adapter, AdapterBase, AdapterConfig
from sparse_ds.adapter.combining import Combination, CombinedAdapter
from sparse_ds.adapter.native import load_adapter, save_adapter

NAME = "model.layers.0.self_attn.q_proj"


@pytest.mark.filterwarnings("ignore:The density 1.0 is greater")
@pytest.mark.parametrize("density", [0.25, 1.0])
def test_dense_task_vectors(tmp_path: Path, density: float) -> None:
    """With K = N the two definitions of density are one. fp32 sums of three differ from fp64 ones in the last digit."""
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(16, 24, generator=generator) for _ in range(3)]
    base = AdapterBase(name="owner/tiny", quantization="none", dtype="float32")
    config = AdapterConfig(method="full", density=1.0, base=base, shapes={NAME: (16, 24)})
    adapters: list[Adapter] = []
    for number, matrix in enumerate(matrices):
        save_adapter(tmp_path / str(number), [(NAME, torch.arange(16 * 24), matrix.flatten())], config=config)
        adapters.append(load_adapter(tmp_path / str(number)))
    weights = (0.7, 1.0, 0.2)

    def merged(combination: Combination) -> torch.Tensor:
        indices, values = CombinedAdapter(adapters, combination).read(NAME)
        dense = torch.zeros(16 * 24)
        dense[indices.long()] = values
        return dense.view(16, 24)

    expected = ties(matrices, torch.tensor(weights), density)
    assert torch.allclose(merged(Combination("ties", weights=weights, density=density)), expected, rtol=1e-6, atol=1e-7)
    expected = task_arithmetic(matrices, torch.tensor(weights))
    assert torch.allclose(merged(Combination("linear", weights=weights)), expected, rtol=1e-6, atol=1e-6)
