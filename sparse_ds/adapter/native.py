"""The native adapter: the deltas of every target module, about 8 bytes per trained weight, or 5 with encoded indices.

    adapter/
      adapter_config.json           what was trained, over which base (`StoredAdapterConfig`)
      adapter_model.safetensors     <module>.indices  int32 [K]  flat row-major positions, unique and ascending
                                                      (int64 where the matrix has 2^31 weights or more)
                                    <module>.values   fp32 [K]   merged weight = round(fp32 w + fp32 value)
                                    <tensor>          fp32       the head of a classification: `score.weight`
                                    with index_encoding "delta", instead of indices:
                                    <module>.index_gaps  uint8 [B]  see `sparse.index_gaps`

`<module>` is the module's name in the transformers model, e.g. `model.layers.0.self_attn.q_proj`, and the deltas are
those of its weight; a name that ends in `.bias` is that bias itself. A vector of D is a matrix [D, 1]. The file needs
no part of this project to be read. A loaded adapter reads one module at a time, so its size does not count in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparse_ds.adapter.adapter import Adapter, AdapterConfig, Deltas
from sparse_ds.adapter.valid_deltas import deltas_problem, dense_problem, index_dtype
from sparse_ds.checkpoint.atomic_folder import atomic_folder
from sparse_ds.config.errors import UserError
from sparse_ds.sparse.index_gaps import decode_gaps, encode_gaps
from sparse_ds.sparse.index_hash import hash_indices

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FORMAT_NAME = "sparse_ds.adapter"
FORMAT_VERSION = 1
IndexEncoding = Literal["plain", "delta"]


class StoredAdapterConfig(AdapterConfig):
    """The content of `adapter_config.json`."""

    format: str = FORMAT_NAME
    format_version: int = FORMAT_VERSION
    sparse_ds_version: str
    index_hash: str
    """`hash_indices` of all modules: equal to that of the run's last event."""
    index_encoding: IndexEncoding = "plain"


class NativeAdapter(Adapter):
    """A folder that `save_adapter` wrote; `load_adapter` checks all of it.

    Args:
        folder: with both files.
        config: the content of `adapter_config.json`.
    """

    def __init__(self, folder: Path, config: StoredAdapterConfig) -> None:
        self.folder, self.config, self.stored = folder, config, config

    def read(self, module_name: str) -> Deltas:
        with safe_open(self.folder / WEIGHTS_FILE, framework="pt") as file:
            values_K = file.get_tensor(f"{module_name}.values")
            if self.stored.index_encoding == "plain":
                return Deltas(file.get_tensor(f"{module_name}.indices"), values_K)
            encoded_B = file.get_tensor(f"{module_name}.index_gaps")
        return Deltas(decode_gaps(encoded_B).to(index_dtype(self.config.shapes[module_name])), values_K)

    def read_dense(self, name: str) -> Tensor:
        with safe_open(self.folder / WEIGHTS_FILE, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor


def save_adapter(
    folder: Path | str,
    deltas: Iterable[tuple[str, Tensor, Tensor]],
    *,
    config: AdapterConfig,
    dense: Mapping[str, Tensor] | None = None,
    index_encoding: IndexEncoding = "plain",
    overwrite: bool = False,
) -> StoredAdapterConfig:
    """Write `adapter_config.json` and `adapter_model.safetensors`, both or neither.

    Memory: all deltas on the host (about 8 bytes per trained weight). `deltas` is read to its end before anything is
    checked or written, so it may be a generator that communicates while other ranks run the same one.

    Args:
        folder: made by this call; it is renamed into place when it is whole.
        deltas: (module name, indices [K] of any integer dtype, values [K]) for each module of `config.shapes`, in any
            order, on any device.
        config: method, density, base and shapes.
        dense: tensor of each name in `config.dense_shapes`.
        index_encoding: "plain", or "delta" for indices of about one byte each.
        overwrite: replace an adapter that is already in `folder`.

    Returns:
        What was stored, with the index hash.

    Raises:
        UserError: `folder` exists and may not be replaced.
        ValueError: the deltas do not fit `config` (missing module, unsorted, out of range, not finite).
        RuntimeError: the files could not be written (disk full); nothing is left behind.
    """
    found: dict[str, Deltas] = {}
    for module_name, indices_K, values_K in deltas:
        assert module_name not in found, f"{module_name} came twice"
        shape = config.shapes.get(module_name, (1, 1))
        found[module_name] = Deltas(
            indices_K.detach().to("cpu", index_dtype(shape)).contiguous(),
            values_K.detach().to("cpu", torch.float32).contiguous(),
        )
    tensors = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in (dense or {}).items()}
    names = {f"{module_name}.{part}" for module_name in found for part in _parts("plain")}
    problem = _names_problem(names | tensors.keys(), config, "plain")
    for name, expected in config.dense_shapes.items():
        problem = problem or dense_problem(name, expected, tensors[name])
    for module_name, shape in config.shapes.items():
        problem = problem or deltas_problem(module_name, shape, found[module_name])
    if problem:
        raise ValueError(f"The adapter cannot be saved: {problem}.")

    # `config` may be one that was stored before: how it is stored now is said anew.
    stored = StoredAdapterConfig(
        **{name: getattr(config, name) for name in AdapterConfig.model_fields},
        sparse_ds_version=version("sparse-ds"),
        index_hash=hash_indices((name, found[name].indices) for name in config.shapes),
        index_encoding=index_encoding,
    )
    for module_name in list(found):
        indices_K, values_K = found.pop(module_name)
        tensors[f"{module_name}.values"] = values_K
        is_plain = index_encoding == "plain"
        tensors[f"{module_name}.{_parts(index_encoding)[0]}"] = indices_K if is_plain else encode_gaps(indices_K)
    folder = Path(folder)
    with atomic_folder(folder, marker=CONFIG_FILE, overwrite=overwrite) as partial:
        try:
            save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
            (partial / CONFIG_FILE).write_text(json.dumps(stored.model_dump(), indent=2) + "\n", encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise RuntimeError(
                f"Could not write the adapter to '{folder}': {error}. Nothing was left there."
            ) from error
    return stored


def load_adapter(folder: Path | str) -> NativeAdapter:
    """Open an adapter and check every number in it, one module at a time.

    Raises:
        UserError: not a folder, a file is missing or damaged, another format or a newer version, or a tensor that is
            missing, unexpected, of the wrong dtype or size, unsorted, duplicate, out of range or not finite, or
            indices that do not match the stored hash. The message names tensor and file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"Adapter folder '{folder}' does not exist. Give the folder that holds '{CONFIG_FILE}'.")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise UserError(f"Adapter folder '{folder}' has no '{name}'. Give a folder that a run wrote as 'adapter/'.")
    config = _load_config(folder / CONFIG_FILE)
    adapter = NativeAdapter(folder, config)
    path = folder / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            problem = _names_problem(set(file.keys()), config, config.index_encoding)
        if problem is None:
            problem = _content_problem(adapter)
    except SafetensorError as error:
        raise UserError(f"Adapter file '{path}' is damaged: {error}. Copy or export it again.") from error
    if problem:
        raise UserError(f"Adapter file '{path}': {problem}. Copy or export it again.")
    if adapter.index_hash != config.index_hash:
        raise UserError(
            f"Adapter file '{path}' does not belong to its '{CONFIG_FILE}': the indices have the hash "
            f"{adapter.index_hash}, expected {config.index_hash}. Copy both files from the same run."
        )
    return adapter


def _content_problem(adapter: NativeAdapter) -> str | None:
    for module_name, shape in adapter.config.shapes.items():
        try:
            problem = deltas_problem(module_name, shape, adapter.read(module_name))
        except ValueError as error:
            problem = f"tensor '{module_name}.index_gaps': {error}"
        if problem:
            return problem
    for name, dense_shape in adapter.config.dense_shapes.items():
        if problem := dense_problem(name, dense_shape, adapter.read_dense(name)):
            return problem
    return None


def _load_config(path: Path) -> StoredAdapterConfig:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"Adapter config '{path}' is not readable JSON: {error}.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT_NAME:
        found = content.get("format", content.get("peft_type")) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"Adapter config '{path}' has format {found!r}, expected {FORMAT_NAME!r}.")
    if content.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"Adapter config '{path}' has format_version {content.get('format_version')!r}, this version of sparse_ds "
            f"reads {FORMAT_VERSION}. Use the sparse_ds that wrote it ({content.get('sparse_ds_version', 'unknown')})."
        )
    try:
        return StoredAdapterConfig.model_validate(content)
    except ValidationError as error:
        details = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise UserError(f"Adapter config '{path}' is not valid: {details}.") from error


def _parts(index_encoding: IndexEncoding) -> tuple[str, str]:
    return ("indices" if index_encoding == "plain" else "index_gaps", "values")


def _names_problem(tensor_names: set[str], config: AdapterConfig, index_encoding: IndexEncoding) -> str | None:
    expected = {f"{module_name}.{part}" for module_name in config.shapes for part in _parts(index_encoding)}
    expected |= set(config.dense_shapes)
    if missing := sorted(expected - tensor_names):
        return f"tensor '{missing[0]}' is missing ({len(missing)} of {len(expected)} are)"
    if unexpected := sorted(tensor_names - expected):
        return f"tensor '{unexpected[0]}' belongs to no module of '{CONFIG_FILE}' ({len(unexpected)} such tensors)"
    return None
