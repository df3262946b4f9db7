"""Weights that a checkpoint holds in bitsandbytes' NF4 already, as transformers saves them.

Of a matrix `name` with N weights in B = ceil(N / 64) blocks:

    <name>                                 packed codes, uint8 [ceil(N / 2), 1] (or the same bytes as bf16, ...)
    <name>.absmax                          fp32 [B] scales; uint8 with double quantization
    <name>.nested_absmax                   fp32 [ceil(B / 256)], double quantization only
    <name>.quant_map, .nested_quant_map    the tables of the codes, always the same
    <name>.quant_state.bitsandbytes__nf4   JSON as bytes: shape, dtype, block sizes, offset of double quantization
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sparse_ds.config.errors import UserError
from sparse_ds.kernels.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE, nf4_code, nf4_sizes, scale_code
from sparse_ds.model.base_checkpoint import BaseCheckpoint

STATE = "quant_state.bitsandbytes__nf4"


def is_bitsandbytes_nf4(quantization_config: Mapping[str, Any]) -> bool:
    """Whether `quantization_config` of a config.json is NF4 by bitsandbytes."""
    is_4bit = quantization_config.get("load_in_4bit") or quantization_config.get("_load_in_4bit")
    kinds = quantization_config.get("quant_method"), quantization_config.get("bnb_4bit_quant_type")
    return bool(is_4bit) and kinds == ("bitsandbytes", "nf4")


@dataclass(frozen=True)
class StoredNF4:
    """One matrix in NF4: the names of its tensors, and what the JSON says."""

    name: str
    shape: tuple[int, ...]
    offset: float | None
    """Of double quantization; None without."""

    @property
    def absmax(self) -> str:
        return f"{self.name}.absmax"

    @property
    def nested_absmax(self) -> str:
        return f"{self.name}.nested_absmax"

    @property
    def names(self) -> list[str]:
        """All tensors of the matrix that may be there."""
        parts = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE)
        return [self.name, *(f"{self.name}.{part}" for part in parts)]


def find_stored_nf4(checkpoint: BaseCheckpoint, name: str) -> StoredNF4 | None:
    """What the checkpoint says of matrix `name`, or None if it holds it unquantized.

    Raises:
        UserError: quantized in a way that cannot be used as it is, or incomplete.
    """
    state_name = f"{name}.{STATE}"
    if state_name not in checkpoint:
        if name in checkpoint and not checkpoint.stored(name).dtype.is_floating_point:
            others = [other for other in checkpoint.names if other.startswith(f"{name}.quant_state.")]
            if others:
                raise _unusable(checkpoint, name, f"as {others[0].rpartition('bitsandbytes__')[2]}")
        return None
    try:
        state: dict[str, Any] = json.loads(bytes(checkpoint.read(state_name).tolist()))
        shape = tuple(int(size) for size in state["shape"])
        block_size, nested_block_size = state["blocksize"], state.get("nested_blocksize", NESTED_BLOCK_SIZE)
        offset = float(state["nested_offset"]) if "nested_offset" in state else None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"model.name_or_path: {checkpoint.folder}: {state_name!r} is no quantization state ({error}). Quantize the "
            "16-bit checkpoint again."
        ) from error
    if (block_size, nested_block_size) != (BLOCK_SIZE, NESTED_BLOCK_SIZE):
        raise _unusable(checkpoint, name, f"in blocks of {block_size} (scales: {nested_block_size})")
    found = StoredNF4(name, shape, offset)
    sizes = nf4_sizes(math.prod(shape))
    expected = {name: sizes.packed, found.absmax: sizes.absmax * (4 if offset is None else 1)}
    if offset is not None:
        expected[found.nested_absmax] = 4 * (sizes.nested_statistics - 1)
    for part, num_bytes in expected.items():
        if part not in checkpoint or checkpoint.stored(part).num_bytes != num_bytes:
            got = f"{checkpoint.stored(part).num_bytes} bytes" if part in checkpoint else "nothing"
            raise UserError(
                f"model.name_or_path: {checkpoint.folder} holds {got} of {part!r}, expected {num_bytes} bytes for a "
                f"matrix of shape {list(shape)}. Quantize the 16-bit checkpoint again."
            )
    for part, table in (("quant_map", nf4_code()), ("nested_quant_map", scale_code())):
        if f"{name}.{part}" in checkpoint and not torch.equal(checkpoint.read(f"{name}.{part}").view(-1), table):
            raise _unusable(checkpoint, name, f"with another table of codes ({part})")
    return found


def _unusable(checkpoint: BaseCheckpoint, name: str, how: str) -> UserError:
    return UserError(
        f"model.name_or_path: {checkpoint.folder} holds {name!r} quantized {how}; expected bitsandbytes NF4 in blocks "
        f"of {BLOCK_SIZE} (scales: {NESTED_BLOCK_SIZE}), or 16 bits. Give the 16-bit checkpoint."
    )
