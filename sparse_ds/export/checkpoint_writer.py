"""Write a transformers checkpoint folder from a function that hands out one tensor at a time.

Names, order and index are those of `PreTrainedModel.save_pretrained`; the model itself never exists in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from sparse_ds.checkpoint.atomic_folder import atomic_folder
from sparse_ds.checkpoint.tensor_file import TensorFile, TensorSpec
from sparse_ds.config.errors import UserError
from sparse_ds.model.base_checkpoint import TOKENIZER_FILES

WEIGHTS_INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class WrittenCheckpoint:
    """What `write_checkpoint` made."""

    folder: Path
    num_shards: int
    num_weights: int
    size_bytes: int


def plan_shards(
    layout: Mapping[str, Tensor],
    *,
    dtype: str,
    max_shard_size: str | int,
    other_dtypes: Mapping[str, torch.dtype] | None = None,
) -> dict[str, list[str]]:
    """File name -> the tensors in it. `write_checkpoint` asks for the tensors in exactly this order.

    Args:
        layout: tensor name -> tensor with its shape (a meta tensor is enough).
        dtype: "bfloat16", "float16" or "float32", of the stored tensors.
        max_shard_size: "5GB", "500MB" or a number of bytes. A larger tensor gets a file of its own.
        other_dtypes: of the tensors that are not stored in `dtype`.

    Raises:
        UserError: unknown dtype or shard size.
    """
    if dtype not in DTYPES:
        raise UserError(f"export.merged_dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")
    dtype_of = dict.fromkeys(layout, DTYPES[dtype]) | dict(other_dtypes or {})
    stored = {
        name: torch.empty(layout[name].shape, dtype=dtype_of[name], device="meta")
        for name in sorted(layout, key=_natural_order)
    }
    try:
        split = split_torch_state_dict_into_shards(stored, max_shard_size=max_shard_size)
    except ValueError as error:
        raise UserError(
            f"export.max_shard_size is {max_shard_size!r}; expected a number with a unit such as '5GB' or '500MB'."
        ) from error
    return split.filename_to_tensors


def write_checkpoint(
    output: Path | str,
    layout: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    *,
    base_folder: Path,
    tokenizer_folder: Path,
    model_card: str | Callable[[], str],
    config_changes: Mapping[str, Any] | None = None,
    more_files: Callable[[], Mapping[str, Mapping[str, Any]]] | None = None,
    dtype: str = "bfloat16",
    other_dtypes: Mapping[str, torch.dtype] | None = None,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
) -> WrittenCheckpoint:
    """Write weights, config.json, generation_config.json, the tokenizer and README.md; all of it or nothing.

    Memory: one tensor, in the dtype that `read` gives and in the stored one.

    Args:
        output: folder to make; it appears in one rename when it is whole.
        layout: tensor name -> floating tensor (or meta tensor) with its shape. A tied tensor is listed once.
        read: name -> the tensor, in any floating dtype, on any device. Called once per tensor in the order of
            `plan_shards`, so it may gather a partitioned parameter while the other ranks walk the same plan.
        base_folder: its config.json (with the dtype changed) and generation_config.json are taken over.
        tokenizer_folder: its tokenizer and chat template are taken over.
        model_card: text of README.md; a function is called after the last tensor.
        config_changes: entries of config.json that differ from the base's (whose quantization is left out).
        more_files: called after the last tensor: name -> content of further JSON files.
        dtype: "bfloat16", "float16" or "float32".
        other_dtypes: of the tensors that are not stored in `dtype`.
        max_shard_size: as in `plan_shards`.
        overwrite: replace a checkpoint that is already in `output`.

    Raises:
        UserError: unknown dtype or shard size, `output` exists, no tokenizer, or a number too large for float16.
        RuntimeError: not enough room on the disk, or writing failed; nothing is left behind.
    """
    output = Path(output)
    shards = plan_shards(layout, dtype=dtype, max_shard_size=max_shard_size, other_dtypes=other_dtypes)
    dtype_of = dict.fromkeys(layout, DTYPES[dtype]) | dict(other_dtypes or {})
    num_weights = sum(tensor.numel() for tensor in layout.values())
    size_bytes = sum(tensor.numel() * dtype_of[name].itemsize for name, tensor in layout.items())
    tokenizer_files = [tokenizer_folder / name for name in TOKENIZER_FILES if (tokenizer_folder / name).is_file()]
    if not tokenizer_files:
        raise UserError(
            f"Folder '{tokenizer_folder}' holds no tokenizer; expected one of {', '.join(TOKENIZER_FILES)}."
        )
    with atomic_folder(output, marker="config.json", overwrite=overwrite) as partial:
        free_bytes = shutil.disk_usage(partial).free
        if free_bytes < size_bytes:
            raise RuntimeError(
                f"Not enough room for '{output}': it needs {size_bytes / 2**30:.2f} GiB, {free_bytes / 2**30:.2f} GiB "
                "are free. Free some, or choose another folder."
            )
        try:
            for file_name, names in shards.items():
                specs = {name: TensorSpec(dtype_of[name], tuple(layout[name].shape)) for name in names}
                with TensorFile(partial / file_name, specs) as file:
                    for name in names:
                        file.write(name, _stored_tensor(name, read(name), layout[name].shape, dtype_of[name]))
            if len(shards) > 1:
                index = {
                    "metadata": {"total_parameters": num_weights, "total_size": size_bytes},
                    "weight_map": {name: file_name for file_name, names in shards.items() for name in names},
                }
                _write_json(partial / WEIGHTS_INDEX_FILE, index)
            config = json.loads((base_folder / "config.json").read_text(encoding="utf-8"))
            config.pop("quantization_config", None)
            # `dtype` is the name since transformers 4.56; older versions and other engines read `torch_dtype`.
            changes = {**(config_changes or {}), "dtype": dtype, "torch_dtype": dtype}
            _write_json(partial / "config.json", {**config, **changes})
            generation_config = base_folder / "generation_config.json"
            for path in [*tokenizer_files, *([generation_config] if generation_config.is_file() else [])]:
                shutil.copyfile(path, partial / path.name)
            card = model_card if isinstance(model_card, str) else model_card()
            (partial / "README.md").write_text(card, encoding="utf-8")
            for name, content in (more_files() if more_files else {}).items():
                _write_json(partial / name, content)
        except OSError as error:
            raise RuntimeError(f"Could not write the model to '{output}': {error}. Nothing was left there.") from error
    return WrittenCheckpoint(output, len(shards), num_weights, size_bytes)


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10, as transformers orders them."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _stored_tensor(name: str, tensor: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """`tensor` on the CPU in `dtype`, contiguous."""
    assert tensor.shape == shape, f"{name}: {tuple(tensor.shape)} is not {tuple(shape)}"
    tensor = tensor.detach().to("cpu")
    stored = tensor.to(dtype).contiguous()
    if dtype == torch.float16 and bool((stored.isinf() & ~tensor.isinf()).any()):
        raise UserError(
            f"Tensor '{name}' holds {float(tensor.abs().max()):.3g}, too large for float16 (at most 65504). "
            "Set export.merged_dtype=bfloat16."
        )
    return stored


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
