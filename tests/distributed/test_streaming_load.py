"""The base is loaded slice by slice, and is bit for bit what bitsandbytes and torch make of the whole tensors.

Every check runs on 1, 2, 3 and 4 real ranks. The expected tensors are made by `bitsandbytes.functional.quantize_4bit`
on the whole tensor, by code that knows nothing of slices.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import save_file
from torch import Tensor

from sparse_ds.config.errors import UserError
from sparse_ds.distributed.born_partitioned import PartitionedParameters
from sparse_ds.distributed.process_group import rank, world_size
from sparse_ds.distributed.zero3_partitions import local_partition, owned_range
from sparse_ds.kernels.nf4 import nf4_sizes
from sparse_ds.model import loading
from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.model.filling import BaseTensor
from sparse_ds.model.loading import load_base, planned_bytes

CPU = torch.device("cpu")
SHAPES = [(1, 1), (1, 3), (3, 7), (8, 8), (1, 64), (5, 13), (33, 129), (130, 127), (64, 1024), (257, 515), (96, 2048)]
"""Odd sizes, part blocks, fewer blocks than ranks, part and several groups of 256 scales."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def full_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{kind}.{rows}x{cols}": (torch.randn(rows, cols, generator=generator) / 20).to(dtype)
        for kind, dtype in DTYPES.items()
        for rows, cols in SHAPES
    }


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    """Two shards with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or {}))
    names = list(tensors)
    files = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file_name, chosen in files.items():
        save_file({name: tensors[name].contiguous() for name in chosen}, folder / file_name)
    weight_map = {name: file_name for file_name, chosen in files.items() for name in chosen}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def as_transformers_saves(
    name: str, weight: Tensor, double_quantization: bool, storage: torch.dtype
) -> dict[str, Tensor]:
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, compress_statistics=double_quantization, quant_type="nf4", quant_storage=storage
    )
    stored = {f"{name}.{part}": content for part, content in state.as_dict(packed=True).items()}
    return {name: packed, **stored}


def expected_parts(weight: Tensor, dtype: torch.dtype, double_quantization: bool) -> dict[str, Tensor]:
    packed, state = bnb.quantize_4bit(
        weight.to(dtype), blocksize=64, compress_statistics=double_quantization, quant_type="nf4"
    )
    parts = {"packed": packed.view(-1), "absmax": state.absmax}
    if double_quantization:
        parts["nested_statistics"] = torch.cat([state.state2.absmax, state.offset.reshape(1)])
    return parts


def make_nf4(partitioned: PartitionedParameters, num_elements: int, double_quantization: bool) -> dict[str, Any]:
    sizes = nf4_sizes(num_elements)
    made = {
        "packed": partitioned.make((sizes.packed,), torch.uint8, requires_grad=False),
        "absmax": partitioned.make(
            (sizes.absmax,), torch.uint8 if double_quantization else torch.float32, requires_grad=False
        ),
    }
    if double_quantization:
        made["nested_statistics"] = partitioned.make((sizes.nested_statistics,), torch.float32, requires_grad=False)
    return made


def assert_owned(parameter: Any, full: Tensor, what: str) -> None:
    start, num_real = owned_range(parameter)
    own, expected = local_partition(parameter), full.reshape(-1)[start : start + num_real]
    assert own.dtype == expected.dtype and torch.equal(own, expected), f"{what}: another slice on rank {rank()}"
    assert not parameter.ds_tensor.view(-1)[num_real:].any(), f"{what}: padding is not zero"


def load(
    folder: Path, full: dict[str, Tensor], dtype: torch.dtype, double_quantization: bool, as_nf4: bool
) -> BaseCheckpoint:
    """Load all tensors of `full` from `folder` and compare with bitsandbytes on the whole ones."""
    checkpoint, partitioned = BaseCheckpoint(folder), PartitionedParameters()
    tensors = []
    for name, weight in full.items():
        shape = tuple(weight.shape)
        if as_nf4:
            made = make_nf4(partitioned, weight.numel(), double_quantization)
            tensors.append(BaseTensor(name, shape, dtype, True, double_quantization, made))
        else:
            made = {"weight": partitioned.make(shape, dtype, requires_grad=False)}
            tensors.append(BaseTensor(name, shape, dtype, parameters=made))
    planned = planned_bytes(checkpoint, tensors, rank(), world_size())
    before = checkpoint.bytes_read
    shown: list[int] = []
    report = load_base(checkpoint, tensors, CPU, on_bytes=shown.append)
    assert sum(shown) == planned <= report.bytes_read == checkpoint.bytes_read - before
    for tensor in tensors:
        expected = {"weight": full[tensor.name].to(dtype)}
        if as_nf4:
            expected = expected_parts(full[tensor.name], dtype, double_quantization)
        assert expected.keys() == tensor.parameters.keys()
        for role, parameter in tensor.parameters.items():
            assert_owned(parameter, expected[role], f"{tensor.name} {role}")
    return checkpoint


def check_bit_identity(folder: Path) -> None:
    # Small chunks, so that every tensor above 16384 weights comes in several; and one group per tensor.
    loading.CHUNK_WEIGHTS["cpu"], loading.GROUP_BYTES = 64 * 256, 1
    full = full_tensors()
    for dtype in (torch.bfloat16, torch.float32):
        for double_quantization in (False, True):
            load(folder / "dense", full, dtype, double_quantization, as_nf4=True)
        load(folder / "dense", full, dtype, False, as_nf4=False)
    load(folder / "bin", full, torch.bfloat16, True, as_nf4=True)


def check_stored_nf4(folder: Path) -> None:
    loading.CHUNK_WEIGHTS["cpu"] = 64 * 256
    full = {name: weight for name, weight in full_tensors().items() if name.startswith("bf16")}
    for double_quantization in (False, True):
        for storage in ("uint8", "bfloat16"):
            stored = folder / f"nf4-{double_quantization}-{storage}"
            if storage == "bfloat16":
                full = {name: weight for name, weight in full.items() if weight.numel() % 4 == 0}
            load(stored, full, torch.bfloat16, double_quantization, as_nf4=True)
            dequantized = {
                name: bnb.dequantize_4bit(
                    *bnb.quantize_4bit(weight, compress_statistics=double_quantization, quant_type="nf4")
                ).reshape(weight.shape)
                for name, weight in full.items()
                if weight.shape[1] % 2 == 0
            }
            load(stored, dequantized, torch.bfloat16, double_quantization, as_nf4=False)


def check_share_of_the_bytes(folder: Path) -> None:
    """Of large matrices a rank reads little more than its share, and all ranks together little more than the file."""
    checkpoint, partitioned = BaseCheckpoint(folder / "large"), PartitionedParameters()
    shape = checkpoint.stored("large").shape
    for double_quantization in (False, True):
        made = make_nf4(partitioned, math.prod(shape), double_quantization)
        tensor = BaseTensor("large", shape, torch.bfloat16, True, double_quantization, made)
        report = load_base(checkpoint, [tensor], CPU)
        assert report.bytes_read <= 1.01 * checkpoint.size_bytes / world_size()


def check_a_damaged_slice_ends_all_ranks(folder: Path) -> None:
    """NaN in the last weight: one rank sees it, all of them stop, before the gather of double quantization."""
    checkpoint, partitioned = BaseCheckpoint(folder / "damaged"), PartitionedParameters()
    made = make_nf4(partitioned, 64 * 64, True)
    tensor = BaseTensor("weight", (64, 64), torch.bfloat16, True, True, made)
    with pytest.raises(UserError, match=r"tensor 'weight' of .* holds NaN or Inf") as caught:
        load_base(checkpoint, [tensor], CPU)
    if world_size() > 1:
        assert f"on rank {world_size() - 1}" in str(caught.value)


def check_tied_copies(folder: Path) -> None:
    checkpoint, partitioned = BaseCheckpoint(folder / "tied"), PartitionedParameters()
    made = {"weight": partitioned.make((7, 5), torch.bfloat16, requires_grad=False)}
    tensor = BaseTensor("embedding", (7, 5), torch.bfloat16, parameters=made)
    load_base(checkpoint, [tensor], CPU, tied_copies={"same": "embedding"})
    with pytest.raises(UserError, match=r"config.json ties 'different' to 'embedding', but .* different weights"):
        load_base(checkpoint, [tensor], CPU, tied_copies={"different": "embedding"})


def check_all(folder: Path) -> None:
    torch.compiler.set_stance("force_eager")
    check_bit_identity(folder)
    check_stored_nf4(folder)
    check_share_of_the_bytes(folder)
    check_tied_copies(folder)
    check_a_damaged_slice_ends_all_ranks(folder)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    full = full_tensors()
    write_checkpoint(folder / "dense", full)
    (folder / "bin").mkdir()
    (folder / "bin" / "config.json").write_text("{}")
    torch.save(full, folder / "bin" / "pytorch_model.bin")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for double_quantization in (False, True):
        for storage in (torch.uint8, torch.bfloat16):
            stored: dict[str, Tensor] = {}
            for name, weight in full.items():
                if name.startswith("bf16") and (storage == torch.uint8 or weight.numel() % 4 == 0):
                    stored |= as_transformers_saves(name, weight, double_quantization, storage)
            storage_name = str(storage).removeprefix("torch.")
            write_checkpoint(folder / f"nf4-{double_quantization}-{storage_name}", stored)
    torch.set_num_threads(num_threads)
    write_checkpoint(folder / "large", {"large": torch.randn(1024, 1000).bfloat16() / 20})
    damaged = torch.randn(64, 64).bfloat16()
    damaged[-1, -1] = math.nan
    write_checkpoint(folder / "damaged", {"weight": damaged})
    embedding = torch.randn(7, 5).bfloat16()
    different = embedding.clone()
    different[3, 3] += 1
    write_checkpoint(folder / "tied", {"embedding": embedding, "same": embedding.clone(), "different": different})
    return folder


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_slices_are_those_of_the_whole_tensor(num_ranks: int, checkpoints: Path) -> None:
    run_ranks(num_ranks, check_all, checkpoints)
