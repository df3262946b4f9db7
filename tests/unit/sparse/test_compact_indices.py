"""The compact form of indices against its definition, a Python integer as the bit vector; and a layer over it."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from sparse_ds.kernels.crossover import PathChoice
from sparse_ds.sparse import sparse_linear
from sparse_ds.sparse.compact_indices import decode_indices, encode_indices, num_high_bytes
from sparse_ds.sparse.index_storage import IndexStorage, indices_of_pieces, new_index_tensors
from sparse_ds.sparse.layout import SparseLayout
from sparse_ds.sparse.sparse_linear import SparseLinear

POSITIONS = [1, 5, 255, 256, 257, 1000, 7 * 256, 3 * 509]


def expected_bits(indices: list[int], num_slots: int, num_positions: int) -> bytes:
    """One Python integer as the bit vector."""
    slots = indices + [num_positions - 1] * (num_slots - len(indices))
    vector = sum(1 << (index // 256 + k) for k, index in enumerate(slots))
    return vector.to_bytes(-(-(num_slots + -(-num_positions // 256)) // 8), "little")


@pytest.mark.parametrize("num_positions", POSITIONS)
def test_it_is_the_definition_for_none_one_some_and_all(num_positions: int) -> None:
    drawn = random.Random(num_positions)
    for num_active in sorted({0, 1, num_positions // 40, num_positions // 2, num_positions}):
        for num_slots in sorted({num_active, min(num_positions, num_active + 1), num_positions}):
            indices = sorted(drawn.sample(range(num_positions), num_active))
            padded = torch.tensor(indices + [0] * (num_slots - num_active), dtype=torch.int32)
            low_bytes, high_bits = encode_indices(padded, num_active, num_positions)
            assert low_bytes.dtype == high_bits.dtype == torch.uint8
            assert low_bytes[:num_active].tolist() == [index % 256 for index in indices]
            assert bytes(high_bits.tolist()) == expected_bits(indices, num_slots, num_positions)
            assert high_bits.numel() == num_high_bytes(num_slots, num_positions)
            decoded = decode_indices(low_bytes, high_bits, num_slots, torch.int32)
            assert decoded.dtype == torch.int32 and decoded[:num_active].tolist() == indices
            assert all(0 <= index < num_positions for index in decoded.tolist())
            # A slice of the low bytes is enough for a slice of the indices.
            begin, end = num_active // 3, num_active - num_active // 4
            part = decode_indices(low_bytes[begin:end], high_bits, num_slots, torch.int64, start=begin)
            assert part.dtype == torch.int64 and part.tolist() == indices[begin:end]


def test_the_lists_at_both_ends_of_a_matrix() -> None:
    for num_active in (1, 8, 300):
        for first in (0, 5000 - num_active):
            indices = torch.arange(first, first + num_active)
            stored = encode_indices(indices, num_active, 5000)
            assert torch.equal(decode_indices(*stored, num_active, torch.int64), indices)


def test_what_is_encoded_is_not_changed() -> None:
    indices = torch.tensor([3, 700, 0, 0])
    encode_indices(indices, 2, 900)
    assert indices.tolist() == [3, 700, 0, 0]


def test_positions_beyond_int32() -> None:
    """A grid of 2^33 positions would have a bit vector of 4 MiB; the arithmetic is that of 64 bits all through."""
    num_positions = 2**33
    indices = torch.tensor([0, 2**31 - 1, 2**31, 2**32 + 17, num_positions - 1])
    low_bytes, high_bits = encode_indices(indices, 5, num_positions)
    assert high_bits.numel() == num_high_bytes(5, num_positions) == (5 + 2**25 + 7) // 8
    assert torch.equal(decode_indices(low_bytes, high_bits, 5, torch.int64), indices)


MOST_BYTES = [(0.001, 1.62), (0.003, 1.29), (0.006, 1.21), (0.0125, 1.17), (0.023, 1.15)]


@pytest.mark.parametrize(("density", "most"), MOST_BYTES)
def test_bytes_per_index(density: float, most: float) -> None:
    num_positions = 2048 * 5632
    num_active = int(density * num_positions)
    num_bytes = num_active + num_high_bytes(num_active, num_positions)
    assert most - 0.02 < num_bytes / num_active <= most


ROWS, COLS, ACTIVE = 13, 50, 60


def make_layer(storage: IndexStorage, spare_slots: int = 0) -> SparseLinear:
    generator = torch.Generator().manual_seed(1)
    layout = SparseLayout(ROWS, COLS, ACTIVE, spare_slots)
    indices = torch.randperm(ROWS * COLS, generator=generator)[:ACTIVE].sort().values
    indices_S = torch.cat([indices, torch.zeros(spare_slots, dtype=torch.int64)])
    values_S = torch.cat([torch.randn(ACTIVE, generator=generator), torch.zeros(spare_slots)])
    tensors = {"weight": Parameter(torch.randn(ROWS, COLS, generator=generator), requires_grad=False)}
    tensors["values"] = Parameter(values_S)
    for name, whole in new_index_tensors(indices_S, layout, ACTIVE, storage).items():
        tensors[name] = Parameter(whole, requires_grad=False)
    return SparseLinear(layout, torch.float32, tensors)


@pytest.mark.parametrize("spare_slots", [0, 9])
@pytest.mark.parametrize("path", ["sampled", "dense"])
def test_a_layer_computes_the_same_bits(spare_slots: int, path: str) -> None:
    results: list[list[Tensor]] = []
    for storage in ("int32", "compact"):
        layer = make_layer(storage, spare_slots)
        layer.path_choice = PathChoice(path)  # type: ignore[arg-type]
        x = torch.randn(7, COLS, generator=torch.Generator().manual_seed(2)).requires_grad_()
        output = layer(x)
        output.square().sum().backward()
        assert x.grad is not None and layer.values.grad is not None
        results.append([layer.active_indices, output, x.grad, layer.values.grad])
    for plain, compact in zip(*results, strict=True):
        assert plain.dtype == compact.dtype and torch.equal(plain, compact)
    assert results[1][0].dtype == torch.int32


def test_a_layer_decodes_once_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    num_decoded = 0

    def counting(*args: object, **kwargs: object) -> Tensor:
        nonlocal num_decoded
        num_decoded += 1
        return decode_indices(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(sparse_linear, "decode_indices", counting)
    layer = make_layer("compact")
    layer.path_choice = PathChoice("sampled")
    output = layer(torch.randn(7, COLS).requires_grad_())
    assert num_decoded == 1
    output.sum().backward()
    assert num_decoded == 2


def test_the_whole_is_what_the_pieces_say() -> None:
    for storage in ("int32", "compact"):
        layer = make_layer(storage, 9)
        layer.num_active = ACTIVE - 7
        whole = [getattr(layer, name).data for name in new_index_tensors(torch.zeros(69), layer.layout, 0, storage)]
        assert torch.equal(indices_of_pieces(layer, whole), make_layer("int32").active_indices[: ACTIVE - 7])


@pytest.mark.gpu
def test_decoding_on_a_gpu_does_not_wait_for_it() -> None:
    num_positions, num_active = 4096 * 11008, 100_000
    indices = torch.randperm(num_positions, generator=torch.Generator().manual_seed(0))[:num_active].sort().values
    stored = [each.cuda() for each in encode_indices(indices, num_active, num_positions)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decoded = decode_indices(stored[0], stored[1], num_active, torch.int32)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(decoded.cpu().long(), indices)
    on_gpu = encode_indices(indices.cuda(), num_active, num_positions)
    assert all(torch.equal(left, right) for left, right in zip(on_gpu, stored, strict=True))
