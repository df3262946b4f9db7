"""The contract with torch's flight recorder: the last collective is known by number and name."""

from __future__ import annotations

import torch
import torch.distributed
from ranks import run_ranks

from sparse_ds.distributed.last_collective import NUM_RECORDED, Collective, last_collective


def count_collectives() -> list[Collective]:
    seen = [last_collective()]
    for _ in range(2 * NUM_RECORDED):
        torch.distributed.all_reduce(torch.ones(4, 2))
    seen.append(last_collective())
    torch.distributed.all_gather_into_tensor(torch.empty(6), torch.ones(3))
    seen.append(last_collective())
    torch.distributed.barrier()
    seen.append(last_collective())
    return seen


def test_number_and_name_of_the_last_collective() -> None:
    for first, after_many, gathered, barrier in run_ranks(2, count_collectives):
        assert first.number >= 1, "joining the group has begun some"
        assert after_many == (first.number + 2 * NUM_RECORDED, "gloo:all_reduce of 4x2 Float")
        assert gathered == (after_many.number + 1, "gloo:all_gather of 3 Float")
        assert barrier == (gathered.number + 1, "gloo:barrier")
        assert str(barrier) == f"{barrier.number} (gloo:barrier)"


def test_without_a_process_group_there_is_none() -> None:
    assert last_collective() == (0, "")
