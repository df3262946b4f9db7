"""`distributed.zero3_partitions` against DeepSpeed's own local-fragment API, on 1, 2 and 3 ranks."""

from __future__ import annotations

import math
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param
from ranks import run_ranks
from toy_engine import CPU, LAYOUTS, Toy, start_toy

from sparse_ds.distributed.process_group import rank, world_size
from sparse_ds.distributed.zero3_partitions import (
    all_reduce_max_,
    all_reduce_sum,
    gather_partitions,
    local_partition,
    owned_range,
    release_gathered,
)

X = torch.randn(6, 11, generator=torch.Generator().manual_seed(5))
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
ENGINES: list[dict[str, Any]] = [{}, {"sub_group_size": 3}, OFFLOAD, {"sub_group_size": 1, **OFFLOAD}]


def check_master(toy: Toy, num_sub_groups: int) -> None:
    master = toy.master
    assert len(master.flats) == num_sub_groups
    for _ in range(2):
        toy.train_step(X)
    for name, layer in toy.layers.items():
        start, num_real = owned_range(layer.values)
        size = math.ceil(LAYOUTS[name].num_active / world_size())
        assert (start, num_real) == (min(rank() * size, layer.values.ds_numel), len(master.view(layer.values)))
        # DeepSpeed's fragment includes the padding.
        assert torch.equal(master.view(layer.values), safe_get_local_fp32_param(layer.values)[:num_real].cpu())
        (full,) = gather_partitions([layer.values], [master.view(layer.values)], CPU)
        assert full.shape == (LAYOUTS[name].num_active,) and full.count_nonzero() > 0
        assert torch.equal(full, safe_get_full_fp32_param(layer.values).view(-1).cpu())
        assert torch.equal(local_partition(layer.values), master.view(layer.values)), "what is gathered is no copy"


def check_writes(toy: Toy) -> None:
    """What is written is what a later gather sees, and what the master holds; padding stays out of it."""
    for layer in toy.layers.values():
        start, num_real = owned_range(layer.values)
        toy.master.write_values(layer.values, torch.arange(start, start + num_real).float() + 0.5)
    release_gathered(toy.engine)
    for name, layer in toy.layers.items():
        expected = torch.arange(LAYOUTS[name].num_active) + 0.5
        with deepspeed.zero.GatheredParameters([layer.values]):
            assert torch.equal(layer.values.data, expected)
        assert torch.equal(safe_get_full_fp32_param(layer.values).view(-1).cpu(), expected)


def check_padding(toy: Toy) -> None:
    num_real = sum(owned_range(layer.values)[1] for layer in toy.layers.values())
    kept = {name: toy.master.view(layer.values).clone() for name, layer in toy.layers.items()}
    for flat in toy.master.flats:
        flat.detach().fill_(math.nan)
    for name, layer in toy.layers.items():
        toy.master.view(layer.values).copy_(kept[name])
    num_padding = sum(int(flat.isnan().sum()) for flat in toy.master.flats)
    assert num_padding == sum(flat.numel() for flat in toy.master.flats) - num_real
    toy.master.zero_padding()
    assert not any(bool(flat.isnan().any()) for flat in toy.master.flats)
    for name, layer in toy.layers.items():
        assert torch.equal(toy.master.view(layer.values), kept[name])


def check_gather_of_mixed_dtypes(toy: Toy) -> None:
    """One collective for slices of 1, 2, 4 and 8 bytes an element, in an order that needs rearranging."""
    parameters, partitions, expected = [], [], []
    for dtype in (torch.uint8, torch.bfloat16, torch.int64, torch.float32, torch.int32):
        for layer in toy.layers.values():
            full = torch.arange(layer.values.ds_numel).to(dtype) + 3
            start, num_real = owned_range(layer.values)
            parameters.append(layer.values)
            partitions.append(full[start : start + num_real])
            expected.append(full)
    for full, flat in zip(expected, gather_partitions(parameters, partitions, CPU), strict=True):
        assert flat.dtype == full.dtype and torch.equal(flat, full)


def check_bytes(toy: Toy) -> None:
    parameters = list(toy.model.parameters())
    size = world_size()
    expected = sum(math.ceil(p.ds_numel / size) * p.element_size() for p in parameters)
    assert sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in parameters) == expected
    assert sum(p.data.numel() for p in parameters) == 0
    with deepspeed.zero.GatheredParameters([toy.layers["first"].weight]):
        assert sum(p.data.numel() * p.data.element_size() for p in parameters) == 13 * 11 * 4


def check_reductions() -> None:
    maxima = torch.tensor([float(rank()), -float(rank()), 7.0])
    all_reduce_max_(maxima, CPU)
    assert maxima.tolist() == [world_size() - 1, 0, 7]
    # 2^24 + 1 is the first integer that fp32 cannot hold.
    assert all_reduce_sum([1.0, 2.0**24 + 1 if rank() == 0 else 0.0], CPU) == [world_size(), 2.0**24 + 1]


def check_all() -> None:
    for zero in ENGINES:
        toy = start_toy(zero=zero)
        check_master(toy, num_sub_groups=expected_sub_groups(zero.get("sub_group_size")))
        check_writes(toy)
        check_padding(toy)
    check_gather_of_mixed_dtypes(toy)
    check_bytes(toy)
    check_reductions()


def expected_sub_groups(sub_group_size: int | None) -> int:
    """DeepSpeed closes a sub-group once its partitions have reached the size."""
    if sub_group_size is None:
        return 1
    groups, filled = 1, 0
    for layout in LAYOUTS.values():
        if filled >= sub_group_size:
            groups, filled = groups + 1, 0
        filled += math.ceil(layout.num_active / world_size())
    return groups


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_view_on_the_engine_agrees_with_deepspeed(num_ranks: int) -> None:
    run_ranks(num_ranks, check_all)
