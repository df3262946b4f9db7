"""A whole tensor of the frozen base as training sees it: what the deltas are added to."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ds.config.errors import UserError
from sparse_ds.kernels.nf4 import dequantize_nf4, quantize_nf4
from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.model.stored_nf4 import StoredNF4, find_stored_nf4


def read_frozen(
    checkpoint: BaseCheckpoint,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    nf4: bool,
    double_quantization: bool = False,
    device: torch.device | str = "cpu",
) -> Tensor:
    """One tensor of the base, quantized and dequantized again where training does so.

    Args:
        checkpoint: the base model; what it holds in NF4 is dequantized, never quantized again.
        name: of the tensor.
        shape: expected.
        dtype: of the training.
        nf4: training keeps it in NF4.
        double_quantization: and its scales in 8 bits.
        device: where to quantize; the result lies there.

    Returns:
        A new contiguous tensor of `shape` and `dtype`.

    Raises:
        UserError: of another shape, or no weight.
    """
    stored_nf4 = find_stored_nf4(checkpoint, name)
    stored = checkpoint.stored(name)
    found = stored.shape if stored_nf4 is None else stored_nf4.shape
    if found != shape or (stored_nf4 is None and not stored.dtype.is_floating_point):
        raise UserError(
            f"Tensor '{name}' of base '{checkpoint.folder}' has shape {list(found)} and dtype {stored.dtype}, expected "
            f"shape {list(shape)} from its config.json and a floating dtype."
        )
    if stored_nf4 is not None:
        return _dequantized(checkpoint, stored_nf4, dtype, torch.device(device))
    weight = checkpoint.read(name).to(device, dtype)
    return nf4_round_trip(weight, double_quantization=double_quantization) if nf4 else weight


def nf4_round_trip(weight: Tensor, *, double_quantization: bool) -> Tensor:
    """A new tensor like `weight`, with the error of NF4 in blocks of 64."""
    quantized = quantize_nf4(weight, double_quantization=double_quantization)
    return dequantize_nf4(
        quantized.packed, quantized.absmax, quantized.nested_statistics, shape=quantized.shape, dtype=quantized.dtype
    )


def _dequantized(checkpoint: BaseCheckpoint, stored: StoredNF4, dtype: torch.dtype, device: torch.device) -> Tensor:
    nested_statistics = None
    if stored.offset is not None:
        nested_absmax = checkpoint.read(stored.nested_absmax)
        nested_statistics = torch.cat([nested_absmax, torch.tensor([stored.offset])]).to(device)
    packed = checkpoint.read(stored.name).view(-1).view(torch.uint8)
    absmax = checkpoint.read(stored.absmax)
    return dequantize_nf4(packed.to(device), absmax.to(device), nested_statistics, shape=stored.shape, dtype=dtype)
