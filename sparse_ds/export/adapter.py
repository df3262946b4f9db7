"""The native adapter: the deltas of every target module, about 8 bytes per trained weight.

    adapter/
      adapter_config.json           what was trained, over which base (`StoredAdapterConfig`)
      adapter_model.safetensors     <module>.indices  int32 [K]  flat row-major positions, unique and ascending
                                                      (int64 where the matrix has 2^31 weights or more)
                                    <module>.values   fp32 [K]   merged weight = round(fp32 w + fp32 value)
                                    <tensor>          fp32       the head of a classification: `score.weight`, ...

`<module>` is the module's name in the transformers model, e.g. `model.layers.0.self_attn.q_proj`, and the deltas are
those of its weight; a name that ends in `.bias` is that bias itself. A vector of D is a matrix [D, 1]. The file needs
no part of this project to be read. A loaded `Adapter` reads one module at a time, so its size does not count in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparse_ds.checkpoint.atomic_folder import atomic_folder
from sparse_ds.config.errors import UserError
from sparse_ds.sparse.index_hash import hash_indices
from sparse_ds.sparse.layout import SparseLayout

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FORMAT_NAME = "sparse_ds.adapter"
FORMAT_VERSION = 1


class AdapterBase(BaseModel):
    """The frozen model under the deltas, and the form it had during training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """Hub name or folder, as in `model.name_or_path`."""
    revision: str | None = None
    quantization: Literal["nf4", "none"]
    double_quantization: bool = False
    dtype: Literal["bfloat16", "float32"]
    """The dtype of the weights that the deltas were added to."""


class AdapterConfig(BaseModel):
    """What `save_adapter` has to be told."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    density: float = Field(gt=0, le=1)
    """Active / total weights of each target matrix, as configured."""
    base: AdapterBase
    shapes: dict[str, tuple[PositiveInt, PositiveInt]]
    """Module name -> shape of its weight, [out, in]; [D, 1] for the weight of a norm and for `<module>.bias`."""
    dense_shapes: dict[str, tuple[PositiveInt, ...]] = {}
    """Name -> shape of tensors that trained as a whole: stored themselves, not as deltas."""
    task: Literal["causal_lm", "sequence_classification"] = "causal_lm"
    labels: tuple[str, ...] | None = None
    """Of a classification, in the order of the head's rows."""
    pad_token_id: int | None = None
    """Of a classification: transformers reads the last token that is another one."""
    instruction: str | None = None
    """Of a classification: the text around every sample, with {text} in its place (`data.instruction`)."""


class StoredAdapterConfig(AdapterConfig):
    """The content of `adapter_config.json`."""

    format: str = FORMAT_NAME
    format_version: int = FORMAT_VERSION
    sparse_ds_version: str
    index_hash: str
    """`hash_indices` of all modules: equal to that of the run's last event."""


def tensor_name(module_name: str) -> str:
    """The tensor of the base that the deltas of a name of `shapes` belong to."""
    return module_name if module_name.endswith(".bias") else f"{module_name}.weight"


class Deltas(NamedTuple):
    """The trained changes of one matrix."""

    indices: Tensor
    """[K] int32 or int64, flat row-major, unique, ascending."""
    values: Tensor
    """[K] fp32."""


@dataclass(frozen=True)
class Adapter:
    """A validated adapter folder."""

    folder: Path
    config: StoredAdapterConfig

    def read(self, module_name: str) -> Deltas:
        """The deltas of one target module, read from the file now."""
        with safe_open(self.folder / WEIGHTS_FILE, framework="pt") as file:
            return Deltas(file.get_tensor(f"{module_name}.indices"), file.get_tensor(f"{module_name}.values"))

    def read_dense(self, name: str) -> Tensor:
        """A tensor of `dense_shapes`, read from the file now."""
        with safe_open(self.folder / WEIGHTS_FILE, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def items(self) -> Iterator[tuple[str, Deltas]]:
        """(module name, deltas) in the order of the sorted names, one module in memory at a time."""
        for module_name in sorted(self.config.shapes):
            yield module_name, self.read(module_name)


def save_adapter(
    folder: Path | str,
    deltas: Iterable[tuple[str, Tensor, Tensor]],
    *,
    config: AdapterConfig,
    dense: Mapping[str, Tensor] | None = None,
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
        overwrite: replace an adapter that is already in `folder`.

    Returns:
        What was stored, with the index hash.

    Raises:
        UserError: `folder` exists and may not be replaced.
        ValueError: the deltas do not fit `config` (missing module, unsorted, out of range, not finite).
        RuntimeError: the files could not be written (disk full); nothing is left behind.
    """
    tensors: dict[str, Tensor] = {}
    for module_name, indices_K, values_K in deltas:
        assert f"{module_name}.indices" not in tensors, f"{module_name} came twice"
        shape = config.shapes.get(module_name, (1, 1))
        tensors[f"{module_name}.indices"] = indices_K.detach().to("cpu", _index_dtype(shape)).contiguous()
        tensors[f"{module_name}.values"] = values_K.detach().to("cpu", torch.float32).contiguous()
    for name, tensor in (dense or {}).items():
        assert name not in tensors, f"{name} came twice"
        tensors[name] = tensor.detach().to("cpu", torch.float32).contiguous()
    problem = _names_problem(set(tensors), config)
    for name, expected in config.dense_shapes.items():
        problem = problem or _dense_problem(name, expected, tensors[name])
    for module_name, shape in config.shapes.items():
        problem = problem or _deltas_problem(
            module_name, shape, Deltas(tensors[f"{module_name}.indices"], tensors[f"{module_name}.values"])
        )
    if problem:
        raise ValueError(f"The adapter cannot be saved: {problem}.")

    stored = StoredAdapterConfig(
        **config.model_dump(),
        sparse_ds_version=version("sparse-ds"),
        index_hash=hash_indices((name, tensors[f"{name}.indices"]) for name in config.shapes),
    )
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


def load_adapter(folder: Path | str) -> Adapter:
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
    adapter = Adapter(folder, config)
    path = folder / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            problem = _names_problem(set(file.keys()), config)
        if problem is None:
            for module_name, deltas in adapter.items():
                problem = problem or _deltas_problem(module_name, config.shapes[module_name], deltas)
            for name, shape in config.dense_shapes.items():
                problem = problem or _dense_problem(name, shape, adapter.read_dense(name))
    except SafetensorError as error:
        raise UserError(f"Adapter file '{path}' is damaged: {error}. Copy or export it again.") from error
    if problem:
        raise UserError(f"Adapter file '{path}': {problem}. Copy or export it again.")
    index_hash = hash_indices((module_name, deltas.indices) for module_name, deltas in adapter.items())
    if index_hash != config.index_hash:
        raise UserError(
            f"Adapter file '{path}' does not belong to its '{CONFIG_FILE}': the indices have the hash {index_hash}, "
            f"expected {config.index_hash}. Copy both files from the same run."
        )
    return adapter


def _load_config(path: Path) -> StoredAdapterConfig:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
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


def _names_problem(tensor_names: set[str], config: AdapterConfig) -> str | None:
    expected = {f"{module_name}.{part}" for module_name in config.shapes for part in Deltas._fields}
    expected |= set(config.dense_shapes)
    if missing := sorted(expected - tensor_names):
        return f"tensor '{missing[0]}' is missing ({len(missing)} of {len(expected)} are)"
    if unexpected := sorted(tensor_names - expected):
        return f"tensor '{unexpected[0]}' belongs to no module of '{CONFIG_FILE}' ({len(unexpected)} such tensors)"
    return None


def _index_dtype(shape: tuple[int, int]) -> torch.dtype:
    return SparseLayout(num_rows=shape[0], num_cols=shape[1], num_active=0).index_dtype


def _dense_problem(name: str, shape: tuple[int, ...], tensor: Tensor) -> str | None:
    """What is wrong with a tensor that trained as a whole, or None."""
    if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
        return (
            f"tensor '{name}' has dtype {tensor.dtype} and shape {list(tensor.shape)}, expected torch.float32 and "
            f"{list(shape)}"
        )
    if not bool(tensor.isfinite().all()):
        return f"tensor '{name}' holds numbers that are NaN or infinite"
    return None


def _deltas_problem(module_name: str, shape: tuple[int, int], deltas: Deltas) -> str | None:
    """What is wrong with the deltas of one module of `shape`, or None."""
    indices_K, values_K = deltas
    numel = shape[0] * shape[1]
    indices_name, values_name = f"tensor '{module_name}.indices'", f"tensor '{module_name}.values'"
    if indices_K.dtype != _index_dtype(shape):
        return f"{indices_name} has dtype {indices_K.dtype}, expected {_index_dtype(shape)} for shape {list(shape)}"
    if values_K.dtype != torch.float32:
        return f"{values_name} has dtype {values_K.dtype}, expected torch.float32"
    if indices_K.dim() != 1 or indices_K.shape != values_K.shape:
        return (
            f"{indices_name} has shape {list(indices_K.shape)} and {values_name} has shape {list(values_K.shape)}, "
            "expected one and the same length"
        )
    if indices_K.numel() == 0:
        return None
    smallest, largest = int(indices_K.min()), int(indices_K.max())
    if smallest < 0 or largest >= numel:
        return (
            f"{indices_name} holds {smallest if smallest < 0 else largest}, expected 0 to {numel - 1} for shape "
            f"{list(shape)}"
        )
    steps = indices_K[1:] - indices_K[:-1]
    if bool((steps < 0).any()):
        position = int((steps < 0).nonzero()[0])
        return f"{indices_name} is not in ascending order at position {position + 1}"
    if bool((steps == 0).any()):
        return f"{indices_name} holds {int(indices_K[int((steps == 0).nonzero()[0])])} twice"
    if not bool(values_K.isfinite().all()):
        num_bad = int((~values_K.isfinite()).sum())
        return f"{values_name} holds {num_bad} numbers that are NaN or infinite"
    return None
