"""The contract of `distributed.born_partitioned` with the installed DeepSpeed, on 1, 2 and 3 ranks."""

from __future__ import annotations

import math
from typing import Any

import deepspeed
import pytest
import torch
from communication_run import Ledger
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_ds.distributed.born_partitioned import PartitionedParameters, slice_of
from sparse_ds.distributed.process_group import rank, world_size
from sparse_ds.distributed.zero3_partitions import gather_partitions, local_partition, owned_range

SHAPES = [(1,), (2,), (7,), (5, 3), (13, 11), (1, 64)]
DTYPES = [torch.uint8, torch.int32, torch.bfloat16, torch.float32]
BIG_ELEMENTS = 2**24
"""64 MiB in fp32."""


class LargestStorage(TorchDispatchMode):
    """Records the bytes of the largest storage that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else [result]:
            if isinstance(item, Tensor):
                self.num_bytes = max(self.num_bytes, item.untyped_storage().nbytes())
        return result


class FrozenAndTrained(nn.Module):
    """y = (x * scale) W^T with a frozen bf16 W, a frozen uint8 tensor beside it, and a trained fp32 scale."""

    def __init__(self, partitioned: PartitionedParameters, weight: Tensor, codes: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.weight = partitioned.make(tuple(weight.shape), weight.dtype, slice_of(weight), requires_grad=False)
        self.codes = partitioned.make(tuple(codes.shape), codes.dtype, slice_of(codes), requires_grad=False)
        self.scale = partitioned.make(tuple(scale.shape), scale.dtype, slice_of(scale), requires_grad=True)
        self.seen_codes: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen_codes = self.codes.detach().clone()
        return (x * self.scale) @ self.weight.float().t()


def full_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(math.prod(shape))
    return torch.randint(1, 250, shape, generator=generator).to(dtype)


def check_contract() -> None:
    partitioned = PartitionedParameters()
    made = []
    for dtype in DTYPES:
        for shape in SHAPES:
            full, num_elements = full_tensor(shape, dtype), math.prod(shape)
            filled: list[tuple[int, int]] = []

            def fill(partition: Tensor, start: int, full: Tensor = full, filled: list[Any] = filled) -> None:
                filled.append((start, partition.numel()))
                partition.copy_(full.reshape(-1)[start : start + partition.numel()])

            parameter = partitioned.make(shape, dtype, fill, requires_grad=dtype.is_floating_point)
            size = math.ceil(num_elements / world_size())
            start = min(rank() * size, num_elements)
            num_real = min(size, num_elements - start)
            assert filled == ([(start, num_real)] if num_real else []), "asked for more, or less, than the own slice"
            assert owned_range(parameter) == (start, num_real)
            assert parameter.ds_tensor.numel() == size and parameter.ds_tensor.dtype == dtype
            assert torch.equal(parameter.ds_tensor[:num_real], full.reshape(-1)[start : start + num_real])
            assert not parameter.ds_tensor[num_real:].any(), "padding is not zero"
            assert parameter.data.numel() == 0 and parameter.dtype == dtype
            assert tuple(parameter.ds_shape) == shape and parameter.ds_numel == num_elements
            assert parameter.requires_grad is dtype.is_floating_point
            with deepspeed.zero.GatheredParameters([parameter]):
                assert torch.equal(parameter.data, full), f"{dtype} {shape}: gathered something else"
            assert parameter.data.numel() == 0
            assert torch.equal(local_partition(parameter), full.reshape(-1)[start : start + num_real])
            made.append((parameter, full))
    # All dtypes and sizes at once, as DeepSpeed gathers a layer.
    with deepspeed.zero.GatheredParameters([parameter for parameter, _ in made]):
        assert all(torch.equal(parameter.data, full) for parameter, full in made)
    assert all(parameter.data.numel() == 0 for parameter, _ in made)
    # The same as one message, as a submodule's fetch asks for it, in an order that is not the ranks' own.
    everything = [parameter for parameter, _ in reversed(made)]
    with Ledger() as ledger:
        handle = everything[0].all_gather_coalesced(everything)
    assert len(ledger.entries) == (world_size() > 1), ledger.entries
    handle.wait()
    assert all(parameter.dtype == full.dtype and torch.equal(parameter.data, full) for parameter, full in made)
    everything[0].partition(everything)
    assert all(parameter.data.numel() == 0 for parameter, _ in made)
    parameters = [parameter for parameter, _ in made]
    gathered = gather_partitions(parameters, [local_partition(p) for p in parameters], torch.device("cpu"))
    for (_, full), flat in zip(made, gathered, strict=True):
        assert flat.dtype == full.dtype and torch.equal(flat, full.reshape(-1))


def check_nothing_full_is_allocated() -> None:
    with LargestStorage() as largest:
        parameter = PartitionedParameters().make(
            (BIG_ELEMENTS // 64, 64), torch.float32, lambda partition, start: None, requires_grad=True
        )
    assert largest.num_bytes == 4 * math.ceil(BIG_ELEMENTS / world_size())
    with LargestStorage() as largest:
        deepspeed.zero.GatheredParameters([parameter]).__enter__()
    assert largest.num_bytes >= 4 * BIG_ELEMENTS, "the recorder does not see DeepSpeed's allocations"


def check_offloaded_partitions() -> None:
    full = full_tensor((13, 11), torch.float32)
    partitioned = PartitionedParameters(offload_device="cpu")
    parameter = partitioned.make((13, 11), full.dtype, slice_of(full), requires_grad=False)
    assert parameter.ds_tensor.device.type == "cpu"
    with deepspeed.zero.GatheredParameters([parameter]):
        assert torch.equal(parameter.data, full)


def check_initialize() -> None:
    """A model born partitioned trains through `deepspeed.initialize` like the same model in plain torch."""
    torch.manual_seed(0)
    weight, scale = torch.randn(5, 7).bfloat16(), torch.randn(7)
    codes = full_tensor((9,), torch.uint8)
    x_of_rank = torch.randn(world_size(), 4, 7)
    model = FrozenAndTrained(PartitionedParameters(), weight, codes, scale)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "gradient_clipping": 0.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 64},
    }
    optimizer = torch.optim.SGD([model.scale], lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    reference = scale.clone().requires_grad_()
    for _ in range(3):
        loss = engine(x_of_rank[rank()]).square().mean()
        assert torch.equal(model.seen_codes, codes)
        engine.backward(loss)
        engine.step()
        outputs = (x_of_rank * reference) @ weight.float().t()
        (gradient,) = torch.autograd.grad(outputs.square().mean(), reference)
        reference = (reference - 0.1 * gradient).detach().requires_grad_()
    with deepspeed.zero.GatheredParameters([model.weight, model.codes, model.scale]):
        assert torch.equal(model.weight.data, weight) and torch.equal(model.codes.data, codes)
        # fp32 throughout: only the order of the sums over samples and ranks differs.
        torch.testing.assert_close(model.scale.data, reference.detach(), rtol=1e-5, atol=1e-6)
    assert all(parameter.data.numel() == 0 for parameter in model.parameters())


def check_all() -> None:
    check_contract()
    check_offloaded_partitions()
    check_nothing_full_is_allocated()
    check_initialize()


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_contract_with_deepspeed(num_ranks: int) -> None:
    run_ranks(num_ranks, check_all)
