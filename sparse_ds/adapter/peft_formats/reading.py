"""What both PEFT formats share in reading: folders that this project wrote, and those of PEFT itself.

With `sparse_ds.json` a folder says what it was: the adapter that was exported comes back as it was, in its config too.
Without, it is one that PEFT trained: its entries are sorted, and `base_shapes` fills in what the files do not say.

Of several entries at index 0, those of value 0 only fill up. Everything else that comes twice is refused.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from peft import PeftConfig
from pydantic import ValidationError
from torch import Tensor

from sparse_ds.adapter.adapter import Adapter, AdapterConfig, Deltas
from sparse_ds.adapter.peft_formats.base_shapes import PeftBase
from sparse_ds.adapter.peft_formats.writing import (
    CONFIG_FILE,
    PREFIX,
    RECORD_FILE,
    RECORD_FORMAT,
    WEIGHTS_FILE,
    ExportRecord,
)
from sparse_ds.adapter.valid_deltas import index_dtype
from sparse_ds.config.errors import UserError
from sparse_ds.model.weight_files import BinFile, SafetensorsFile, UnreadableFileError, WeightFile

EXACT_IN_FP32 = (torch.float32, torch.bfloat16, torch.float16)


class PeftAdapter(Adapter):
    """A folder in one of PEFT's formats; every number in it is checked when it is opened, one module at a time.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).
        base_model: folder or hub name of the base; None: `base_model_name_or_path`. Read only where the folder has no
            `sparse_ds.json`.

    Raises:
        UserError: a file is missing or damaged; a tensor is missing, unexpected, of a wrong dtype or shape, out of
            range, duplicate or not finite (the message names tensor and file); no base, or another one; something that
            no deltas can say.
    """

    peft_type: ClassVar[str]
    parts: ClassVar[tuple[str, str]]
    """The names of a module's tensors: of indices, of values."""

    def __init__(self, folder: Path | str, base_model: Path | str | None = None) -> None:
        self.folder = Path(folder)
        self.peft_config = _read_peft_config(self.folder, self.peft_type)
        self._check_config()
        self._path, self._file = _open_weights(self.folder)
        self._base_model = base_model
        self._stored_names = {name.removeprefix(PREFIX): name for name in self._file.tensors}
        """Without PEFT's prefix -> in the file."""
        self._record = _read_record(self.folder)
        if self._record is None:
            self._wrapped = self._find_modules()
            self._check_missing(self._needed())
            self.config = self._known_config()
        else:
            self.config = self._record.config
            num_active = self._record.num_active
            self._wrapped = [name for name in self.config.shapes if num_active[name]] or list(self.config.shapes)
        self._check_missing(self._needed() | self.config.dense_shapes.keys())
        self._check_unexpected(self._needed() | self.config.dense_shapes.keys())
        for module_name in self._wrapped:
            self.read(module_name)
        for name in self.config.dense_shapes:
            self.read_dense(name)
        if self._record is not None and self.index_hash != self._record.index_hash:
            raise UserError(
                f"Adapter file '{self._path}' does not belong to its '{RECORD_FILE}': the indices have the hash "
                f"{self.index_hash}, expected {self._record.index_hash}. Export it again; or delete '{RECORD_FILE}' if "
                "PEFT has written here since."
            )

    def read(self, module_name: str) -> Deltas:
        shape = self.config.shapes[module_name]
        if module_name not in self._wrapped:
            return Deltas(torch.empty(0, dtype=index_dtype(shape)), torch.empty(0))
        positions_N = self._positions(module_name)
        values_name = self._stored_names[f"{module_name}.{self.parts[1]}"]
        values_N = self._read(values_name, EXACT_IN_FP32, num_dims=1).float()
        if values_N.numel() != positions_N.numel():
            raise self._bad(values_name, f"has {values_N.numel()} entries, its indices {positions_N.numel()}")
        if not bool(values_N.isfinite().all()):
            raise self._bad(values_name, f"holds {int((~values_N.isfinite()).sum())} numbers that are NaN or infinite")
        positions_K, values_K = self._without_padding(module_name, positions_N, values_N)
        order_K = positions_K.argsort()
        indices_K = positions_K[order_K]
        twice = (indices_K[1:] == indices_K[:-1]).nonzero()
        if twice.numel():
            row, col = divmod(int(indices_K[int(twice[0])]), shape[1])
            raise self._bad(values_name, f"has more than one value for a weight, first for row {row}, column {col}")
        return Deltas(indices_K.to(index_dtype(shape)), values_K[order_K])

    def _without_padding(self, module_name: str, positions_N: Tensor, values_N: Tensor) -> tuple[Tensor, Tensor]:
        if self._record is None:
            is_at_zero_N = positions_N == 0
            kept_N = ~is_at_zero_N | (values_N != 0) | (int(is_at_zero_N.sum()) == 1)
            return positions_N[kept_N], values_N[kept_N]
        num_active = self._record.num_active[module_name]
        is_rest_empty = not (positions_N[num_active:].any() or values_N[num_active:].any())
        if positions_N.numel() < num_active or not is_rest_empty:
            raise self._bad(
                self._stored_names[f"{module_name}.{self.parts[1]}"],
                f"has other entries than the {num_active} of '{RECORD_FILE}'; delete it if PEFT has written since",
            )
        return positions_N[:num_active], values_N[:num_active]

    def read_dense(self, name: str) -> Tensor:
        stored_name, shape = self._stored_names[name], self.config.dense_shapes[name]
        tensor = self._read(stored_name, EXACT_IN_FP32).float()
        if tuple(tensor.shape) != shape:
            raise self._bad(stored_name, f"has shape {list(tensor.shape)}, expected {list(shape)}")
        if not bool(tensor.isfinite().all()):
            raise self._bad(stored_name, "holds numbers that are NaN or infinite")
        return tensor

    @abstractmethod
    def _positions(self, module_name: str) -> Tensor:
        """[N] int64 flat indices, in range, in any order.

        Raises:
            UserError: they cannot be had.
        """

    def _check_config(self) -> None:
        """Raises UserError: `peft_config` asks for something that no deltas can say."""

    def _read(self, stored_name: str, dtypes: tuple[torch.dtype, ...], num_dims: int | None = None) -> Tensor:
        stored = self._file.tensors[stored_name]
        if stored.dtype not in dtypes or num_dims not in (None, len(stored.shape)):
            expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            dims = "" if num_dims is None else f" and {num_dims} dimension(s)"
            raise self._bad(stored_name, f"is {stored.dtype} {list(stored.shape)}, expected {expected}{dims}")
        try:
            return self._file.read(stored_name, 0, stored.num_elements).view(stored.shape)
        except UnreadableFileError as error:
            raise UserError(f"Adapter file '{self._path}' cannot be read: {error}. Copy or export it again.") from error

    def _check_range(self, stored_name: str, positions_N: Tensor, end: int, what: str = "") -> None:
        if positions_N.numel() and (int(positions_N.min()) < 0 or int(positions_N.max()) >= end):
            smallest, largest = int(positions_N.min()), int(positions_N.max())
            found = smallest if smallest < 0 else largest
            raise self._bad(stored_name, f"holds {what}{found}, expected {what}0 to {end - 1}")

    def _bad(self, stored_name: str, problem: str) -> UserError:
        return UserError(f"Adapter file '{self._path}': tensor '{stored_name}' {problem}. Copy or export it again.")

    def _find_modules(self) -> list[str]:
        names = {name.rpartition(".")[0] for name in self._stored_names if name.rpartition(".")[2] in self.parts}
        if not names:
            raise UserError(
                f"Adapter file '{self._path}' holds no '{self.parts[1]}': expected a {self.peft_type} adapter of PEFT."
            )
        return sorted(names)

    @cached_property
    def _base(self) -> PeftBase:
        return PeftBase(self.folder, self.peft_config, self._base_model)

    def _needed(self) -> set[str]:
        """Names of the tensors of all wrapped modules."""
        needed = {f"{name}.{part}" for name in self._wrapped for part in self.parts}
        if not getattr(self.peft_config, "save_precomputed_indices", True):
            needed -= {f"{name}.{self.parts[0]}" for name in self._wrapped} - self._stored_names.keys()
        return needed

    def _check_missing(self, needed: set[str]) -> None:
        if missing := sorted(needed - self._stored_names.keys()):
            raise UserError(
                f"Adapter file '{self._path}': tensor '{PREFIX}{missing[0]}' is missing ({len(missing)} of "
                f"{len(needed)} are). Copy or export it again."
            )

    def _check_unexpected(self, known: set[str]) -> None:
        if unexpected := sorted(self._stored_names.keys() - known):
            raise UserError(
                f"Adapter file '{self._path}': tensor '{self._stored_names[unexpected[0]]}' is neither an index nor a "
                f"value of a {self.peft_type} adapter ({len(unexpected)} such tensors), and not of modules_to_save. "
                "Merge the adapter with PEFT, and import the difference to the base."
            )

    def _known_config(self) -> AdapterConfig:
        saved_whole = set(self.peft_config.modules_to_save or ())
        dense_shapes = {}
        for name, stored_name in self._stored_names.items():
            module_name = name.rpartition(".")[0]
            if {module_name, module_name.rpartition(".")[2]} & saved_whole:
                dense_shapes[name] = self._file.tensors[stored_name].shape
        values = {name: self._stored_names[f"{name}.{self.parts[1]}"] for name in self._wrapped}
        num_entries = {name: self._file.tensors[stored_name].num_elements for name, stored_name in values.items()}
        return self._base.adapter_config(self.peft_type.lower(), num_entries, dense_shapes)


def _read_peft_config(folder: Path, peft_type: str) -> PeftConfig:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"Adapter folder '{folder}' has no '{CONFIG_FILE}'. Give the folder that PEFT loads.")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # whatever PEFT finds in it
        reason = " ".join(str(error).split())
        raise UserError(
            f"Adapter config '{path}' cannot be read by PEFT ({type(error).__name__}: {reason})."
        ) from error
    found = getattr(config.peft_type, "value", config.peft_type)
    if found != peft_type:
        raise UserError(f"Adapter config '{path}' has peft_type {found!r}, expected {peft_type!r}.")
    return config


def _open_weights(folder: Path) -> tuple[Path, WeightFile]:
    for name, kind in ((WEIGHTS_FILE, SafetensorsFile), ("adapter_model.bin", BinFile)):
        path = folder / name
        if path.is_file():
            try:
                return path, kind(path)
            except UnreadableFileError as error:
                raise UserError(f"Adapter file '{path}' is damaged: {error}. Copy or export it again.") from error
    raise UserError(f"Adapter folder '{folder}' has no '{WEIGHTS_FILE}'. Give the folder that PEFT loads.")


def _read_record(folder: Path) -> ExportRecord | None:
    path = folder / RECORD_FILE
    if not path.is_file():
        return None
    try:
        record = ExportRecord.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        known = error.errors() if isinstance(error, ValidationError) else []
        details = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in known) or str(error)
        raise UserError(f"'{path}' is not what an export wrote: {details}. Export the adapter again.") from error
    is_whole = record.num_active.keys() == record.config.shapes.keys()
    if (record.format, record.format_version) != (RECORD_FORMAT, 1) or not is_whole:
        raise UserError(
            f"'{path}' has format {record.format!r} {record.format_version}, expected {RECORD_FORMAT!r} 1 with all "
            f"modules. Use the sparse_ds that wrote it ({record.sparse_ds_version}), or export the adapter again."
        )
    return record
