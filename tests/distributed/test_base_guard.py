"""The frozen base is compared with what was loaded: a change on one rank stops all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from transformers import TrainerState

from sparse_ds.distributed.born_partitioned import PartitionedParameters, slice_of
from sparse_ds.distributed.process_group import rank
from sparse_ds.training import base_guard
from sparse_ds.training.base_guard import BaseGuard, checksum


def python_checksum(tensor: Tensor) -> int:
    """The same sum in Python's integers."""
    data = bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
    data += b"\0" * (-len(data) % 4)
    words = [int.from_bytes(data[i : i + 4], "little", signed=True) for i in range(0, len(data), 4)]
    total = sum(word * (2 * i + 1) for i, word in enumerate(words)) % 2**64
    return total - 2**64 if total >= 2**63 else total


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_elements", [0, 1, 3, 4, 37, 1000])
def test_checksum(dtype: torch.dtype, num_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randint(0, 255, (num_elements + 1,), generator=generator).to(dtype)[1:]
    expected = python_checksum(tensor)
    assert checksum(tensor) == expected
    monkeypatch.setattr(base_guard, "CHUNK_BYTES", 64)
    assert checksum(tensor) == expected, "it depends on the chunks"
    if num_elements:
        for place in {0, num_elements // 2, num_elements - 1}:
            changed = tensor.clone()
            changed.view(torch.uint8)[place * tensor.element_size()] ^= 1
            assert checksum(changed) != expected
        if num_elements > 1:
            swapped = tensor.roll(1)
            assert checksum(swapped) != expected or torch.equal(swapped, tensor)


def check_guard() -> None:
    partitioned = PartitionedParameters()
    codes = torch.arange(100, dtype=torch.uint8)
    scales = torch.arange(50, dtype=torch.float32)
    frozen: dict[str, Any] = {
        "layer.packed": partitioned.make((100,), torch.uint8, slice_of(codes), requires_grad=False),
        "layer.absmax": partitioned.make((50,), torch.float32, slice_of(scales), requires_grad=False),
    }
    guard = BaseGuard(frozen)
    nothing: Any = None
    state = TrainerState(global_step=1)
    guard.on_train_begin(nothing, state, nothing)
    guard.on_step_end(nothing, state, nothing)
    last = rank() == 1
    if last:
        frozen["layer.packed"].ds_tensor[7] += 1
    # Compared once more at the end, not after every step.
    guard.on_step_end(nothing, TrainerState(global_step=2), nothing)
    with pytest.raises(RuntimeError, match=r"the frozen base changed in the steps up to 3: layer\.packed \(1 in all\)"):
        guard.on_train_end(nothing, TrainerState(global_step=3), nothing)
    if last:
        frozen["layer.packed"].ds_tensor[7] -= 1
    guard.on_train_end(nothing, TrainerState(global_step=3), nothing)
    if last:
        frozen["layer.absmax"].ds_tensor = frozen["layer.absmax"].ds_tensor.bfloat16()
    with pytest.raises(RuntimeError, match=r"the engine changed the dtype of layer\.absmax from torch\.float32 to"):
        guard.on_train_begin(nothing, state, nothing)


def test_a_change_on_one_rank_stops_all() -> None:
    run_ranks(2, check_guard)
