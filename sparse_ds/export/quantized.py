"""Quantize a base model once: a bitsandbytes NF4 checkpoint, as transformers saves it, that loads faster ever after.

Quantized are the linear layers inside the transformer blocks; embeddings, norms and head stay in 16 bits, as in
transformers' own quantization. Both a run of this project and plain transformers load the folder as it is: the weights
are bit for bit those that either makes from the original checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_ds.checkpoint.atomic_folder import check_output_apart
from sparse_ds.config.errors import UserError
from sparse_ds.export.checkpoint_writer import DTYPES, WrittenCheckpoint, write_checkpoint
from sparse_ds.kernels.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE, nf4_code, nf4_sizes, quantize_nf4, scale_code
from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.model.base_tensors import BaseSettings, check_base, list_base_tensors
from sparse_ds.model.build import empty_model
from sparse_ds.model.filling import BaseTensor
from sparse_ds.model.find_base_model import find_base_model
from sparse_ds.model.frozen_weight import read_frozen
from sparse_ds.model.stored_nf4 import STATE, is_bitsandbytes_nf4
from sparse_ds.model.targets import ALL_LINEAR, find_targets
from sparse_ds.monitor.progress import ProgressBytes

STATE_BYTES = 256
"""Room for the JSON of a matrix, padded with spaces: the size of every tensor must be known before it is made."""


def write_nf4_checkpoint(
    base: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "bfloat16",
    double_quantization: bool = False,
    max_shard_size: str | int = "5GB",
    device: str = "cpu",
    overwrite: bool = False,
    show_progress: bool = False,
) -> WrittenCheckpoint:
    """Write `base` with its linear layers in NF4; all of it or nothing.

    Memory: one output shard and a few copies of one matrix.

    Args:
        base: folder or hub name of a 16-bit or 32-bit checkpoint.
        output: folder to make.
        revision: of a hub name.
        dtype: "bfloat16" or "float32": what is not quantized, and what matrices are cast to before they are. Train with
            the same `model.dtype`.
        double_quantization: quantize the scales too.
        max_shard_size: "5GB", "500MB" or a number of bytes.
        device: where to quantize.
        overwrite: replace a checkpoint that is already in `output`.
        show_progress: with a bar.

    Raises:
        UserError: an unreadable, incomplete or already quantized base, NaN or Inf in it, an unusable output folder.
        RuntimeError: not enough room on the disk, or writing failed; nothing is left behind.
    """
    checkpoint = BaseCheckpoint(find_base_model(str(base), revision))
    check_output_apart(Path(output), checkpoint.folder)
    if is_bitsandbytes_nf4(checkpoint.config.get("quantization_config") or {}):
        raise UserError(f"'{checkpoint.folder}' is in NF4 already; give a 16-bit checkpoint.")
    settings = BaseSettings(DTYPES[dtype], nf4=True, double_quantization=double_quantization, attention="eager")
    model = empty_model(checkpoint, settings)
    tensors = list_base_tensors(model, find_targets(model, ALL_LINEAR), settings)
    check_base(checkpoint, tensors, model)
    parts = {tensor.name: _parts(tensor) for tensor in tensors}
    layout = {name: part for by_name in parts.values() for name, part in by_name.items()}
    with ProgressBytes("quantizing", checkpoint.size_bytes, enabled=show_progress) as progress:
        return write_checkpoint(
            output,
            layout,
            _Quantize(checkpoint, tensors, parts, device, progress).read,
            base_folder=checkpoint.folder,
            tokenizer_folder=checkpoint.folder,
            model_card=_model_card(checkpoint.folder.name, dtype, double_quantization),
            config_changes={"quantization_config": _quantization_config(dtype, double_quantization)},
            dtype=dtype,
            other_dtypes={name: part.dtype for name, part in layout.items()},
            max_shard_size=max_shard_size,
            overwrite=overwrite,
        )


def _parts(tensor: BaseTensor) -> dict[str, Tensor]:
    """Name -> meta tensor of everything that stores `tensor`."""

    def meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    name = tensor.name
    if not tensor.nf4:
        return {name: meta(tensor.shape, tensor.dtype)}
    sizes, double = nf4_sizes(tensor.num_elements), tensor.double_quantization
    parts = {
        name: meta((sizes.packed, 1), torch.uint8),
        f"{name}.absmax": meta((sizes.absmax,), torch.uint8 if double else torch.float32),
        f"{name}.quant_map": meta((16,), torch.float32),
        f"{name}.{STATE}": meta((STATE_BYTES,), torch.uint8),
    }
    if double:
        parts[f"{name}.nested_absmax"] = meta((sizes.nested_statistics - 1,), torch.float32)
        parts[f"{name}.nested_quant_map"] = meta((256,), torch.float32)
    return parts


class _Quantize:
    """Hands out tensors; a matrix is quantized when its first part is asked for and dropped after its last."""

    def __init__(
        self,
        checkpoint: BaseCheckpoint,
        tensors: list[BaseTensor],
        parts: dict[str, dict[str, Tensor]],
        device: str,
        progress: ProgressBytes,
    ) -> None:
        self._checkpoint, self._device, self._progress = checkpoint, device, progress
        self._tensor_of = {part: tensor for tensor in tensors for part in parts[tensor.name]}
        self._made: dict[str, Tensor] = {}

    @torch.no_grad()
    def read(self, name: str) -> Tensor:
        if name not in self._made:
            self._made |= self._make(self._tensor_of[name])
        return self._made.pop(name)

    def _make(self, tensor: BaseTensor) -> dict[str, Tensor]:
        name = tensor.name
        weight = read_frozen(
            self._checkpoint, name, tensor.shape, tensor.dtype, nf4=False, device=self._device if tensor.nf4 else "cpu"
        )
        if not bool(torch.isfinite(weight).all()):
            raise UserError(
                f"Tensor '{name}' of base '{self._checkpoint.folder}' holds NaN or Inf; the checkpoint is damaged. Get "
                "it again."
            )
        self._progress.add(self._checkpoint.stored(name).num_bytes)
        if not tensor.nf4:
            return {name: weight}
        quantized = quantize_nf4(weight, double_quantization=tensor.double_quantization)
        state: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": BLOCK_SIZE,
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
        }
        made = {
            name: quantized.packed.view(-1, 1),
            f"{name}.absmax": quantized.absmax,
            f"{name}.quant_map": nf4_code().clone(),
        }
        if quantized.nested_statistics is not None:
            nested = quantized.nested_statistics
            state |= {
                "nested_blocksize": NESTED_BLOCK_SIZE,
                "nested_dtype": "float32",
                "nested_offset": float(nested[-1]),
            }
            made |= {f"{name}.nested_absmax": nested[:-1], f"{name}.nested_quant_map": scale_code().clone()}
        text = json.dumps(state).encode().ljust(STATE_BYTES)
        assert len(text) == STATE_BYTES, f"{name}: its state takes {len(text)} bytes"
        made[f"{name}.{STATE}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return made


def _quantization_config(dtype: str, double_quantization: bool) -> dict[str, Any]:
    """What transformers' BitsAndBytesConfig writes for the same."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quantization,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
    }


def _model_card(base: str, dtype: str, double_quantization: bool) -> str:
    double = " with double quantization" if double_quantization else ""
    return (
        f"# {base} in NF4\n\nThe linear layers of the transformer blocks in bitsandbytes NF4{double} (blocks of "
        f"{BLOCK_SIZE}), everything else in {dtype}; made by sparse_ds from `{base}`. The license is that of the base "
        "model.\n"
    )
