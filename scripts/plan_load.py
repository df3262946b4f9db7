"""What each rank of a job reads and holds of Llama-2-70B: a table, from byte ranges, with no weights at all.

    python scripts/plan_load.py                             # 8, 16 and 64 ranks
    python scripts/plan_load.py --ranks 4 --density 0.01

The checkpoint has the real config.json, names, shapes and headers, and files whose weights are holes. A run's own
functions say which bytes of it every rank would read and how large its partitions would be; no weight is read.

    read       the largest of all ranks, as the loader counts it
    NF4        partitions of packed weights and scales of the target matrices
    16 bit     partitions of everything else (embeddings, norms, head)
    deltas     partitions of indices and values, without gradients and optimizer state
    largest    while loading, a rank holds besides at most about one tensor as large as the largest
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from llama_on_disk import LlamaShape, write_llama
from transformers import PreTrainedModel

from sparse_ds.kernels.nf4 import nf4_sizes
from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.model.base_tensors import BaseSettings, list_base_tensors
from sparse_ds.model.build import SparseSettings, empty_model, plan_layouts
from sparse_ds.model.filling import BaseTensor
from sparse_ds.model.loading import planned_bytes
from sparse_ds.sparse.layout import SparseLayout

LLAMA_2_70B = LlamaShape(hidden=8192, intermediate=28_672, layers=80, heads=64, kv_heads=8, vocab=32_000)
SHARD_BYTES = 10**10
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--density", type=float, default=0.025, help="trained share of each target matrix")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_llama(folder, LLAMA_2_70B, shard_bytes=SHARD_BYTES, holes=True)
        print(table(BaseCheckpoint(folder), arguments.ranks, arguments.density))


def table(checkpoint: BaseCheckpoint, numbers_of_ranks: list[int], density: float) -> str:
    """Markdown."""
    lines = []
    for double in (False, True):
        base = BaseSettings(torch.bfloat16, nf4=True, double_quantization=double, attention="sdpa")
        model = empty_model(checkpoint, base)
        layouts = plan_layouts(model, SparseSettings("all-linear", density, seed=0))
        tensors = list_base_tensors(model, layouts, base)
        lines += [
            line(checkpoint, tensors, layouts, num_ranks, double_quantization=double) for num_ranks in numbers_of_ranks
        ]
    largest_bytes = max(checkpoint.stored(name).num_bytes for name in checkpoint.names)
    return "\n".join(
        [
            f"Llama-2-70B: {num_weights(model):,} weights, {checkpoint.size_bytes:,} bytes "
            f"({checkpoint.size_bytes / GIB:.1f} GiB) in bf16, largest tensor {largest_bytes / GIB:.2f} GiB, density "
            f"{density:g}. Per rank, in GiB:",
            "",
            "| ranks | double quantization | bytes read | read | of the file x ranks | NF4 | 16 bit | deltas | held |",
            "|--:|---|--:|--:|--:|--:|--:|--:|--:|",
            *lines,
        ]
    )


def line(
    checkpoint: BaseCheckpoint,
    tensors: list[BaseTensor],
    layouts: dict[str, SparseLayout],
    num_ranks: int,
    *,
    double_quantization: bool,
) -> str:
    """One row: the rank that reads most; partitions are of one size on all ranks."""
    num_read = max(planned_bytes(checkpoint, tensors, rank, num_ranks) for rank in range(num_ranks))

    def partition_bytes(num_elements: int, item_bytes: int) -> int:
        return -(-num_elements // num_ranks) * item_bytes

    nf4 = dense = deltas = 0
    for tensor in tensors:
        if not tensor.nf4:
            dense += partition_bytes(tensor.num_elements, tensor.dtype.itemsize)
            continue
        sizes = nf4_sizes(tensor.num_elements)
        nf4 += partition_bytes(sizes.packed, 1) + partition_bytes(sizes.absmax, 1 if double_quantization else 4)
        if double_quantization:
            nf4 += partition_bytes(sizes.nested_statistics, 4)
    for layout in layouts.values():
        deltas += partition_bytes(layout.num_slots, layout.index_dtype.itemsize) + partition_bytes(layout.num_slots, 4)
    sizes_gib = " | ".join(f"{num_bytes / GIB:.2f}" for num_bytes in (nf4, dense, deltas, nf4 + dense + deltas))
    return (
        f"| {num_ranks} | {'on' if double_quantization else 'off'} | {num_read:,} | {num_read / GIB:.2f} | "
        f"{num_read * num_ranks / checkpoint.size_bytes:.4f} | {sizes_gib} |"
    )


def num_weights(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
