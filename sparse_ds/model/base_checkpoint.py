"""The files of a base model: which tensor lies in which file, read one tensor at a time.

Formats: one `model.safetensors`, or several with `model.safetensors.index.json`; `pytorch_model.bin` (one or several)
as a fallback, memory-mapped.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparse_ds.config.errors import UserError

logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
SAFETENSORS, BIN = "model.safetensors", "pytorch_model.bin"


class BaseCheckpoint:
    """Reads the weights of a base model from a local folder.

    Args:
        folder: with config.json and weights.

    Raises:
        UserError: no config.json, no weights, an index that names a missing file, an unreadable file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / "config.json")
        self.is_safetensors = True
        self._file_of: dict[str, str] = {}
        self._bin_files: dict[str, dict[str, Tensor]] = {}
        for weights in (SAFETENSORS, BIN):
            if (folder / f"{weights}.index.json").is_file():
                self._file_of = self._check_index(f"{weights}.index.json")
            elif (folder / weights).is_file():
                self._file_of = dict.fromkeys(self._names_in(weights), weights)
            else:
                continue
            self.is_safetensors = weights == SAFETENSORS
            if not self.is_safetensors:
                logger.warning("%s has no safetensors weights: reading its %s files instead", folder, BIN)
            return
        raise UserError(
            f"model.name_or_path: {folder} holds no weights; expected {SAFETENSORS} or {BIN}, or one of them in shards "
            "with its .index.json."
        )

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def names(self) -> list[str]:
        """Tensor names in the order of the files, so that reading them in this order reads every file once."""
        return sorted(self._file_of, key=lambda name: (self._file_of[name], name))

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored, on CPU."""
        file_name = self._file_of[name]
        if file_name.endswith(".bin"):
            tensors = self._bin_tensors(file_name)
            if name not in tensors:
                raise self._unreadable(file_name, KeyError(f"no tensor {name}"))
            return tensors[name]
        with self._open(file_name) as file:
            try:
                tensor: Tensor = file.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise self._unreadable(file_name, error) from error
            return tensor

    def fingerprint(self) -> str:
        """sha256 over config.json and what the weight files say of their tensors (names, shapes, places); not over the
        weights themselves."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file_name in sorted(set(self._file_of.values())):
            path = self.folder / file_name
            digest.update(f"{file_name}\0{path.stat().st_size}\0".encode())
            if self.is_safetensors:
                with path.open("rb") as file:
                    digest.update(file.read(int.from_bytes(file.read(8), "little")))
        return digest.hexdigest()

    def _names_in(self, file_name: str) -> list[str]:
        if file_name.endswith(".bin"):
            return list(self._bin_tensors(file_name))
        with self._open(file_name) as file:
            return list(file.keys())

    def _open(self, file_name: str) -> Any:
        try:
            return safe_open(self.folder / file_name, framework="pt")
        except (SafetensorError, OSError) as error:
            raise self._unreadable(file_name, error) from error

    def _bin_tensors(self, file_name: str) -> dict[str, Tensor]:
        if file_name not in self._bin_files:
            try:
                content = torch.load(self.folder / file_name, map_location="cpu", mmap=True, weights_only=True)
            except Exception as error:  # torch.load raises whatever its unpickler meets
                raise self._unreadable(file_name, error) from error
            self._bin_files[file_name] = {k: v for k, v in content.items() if isinstance(v, Tensor)}
        return self._bin_files[file_name]

    def _check_index(self, file_name: str) -> dict[str, str]:
        weight_map = read_index(self.folder / file_name)
        missing = sorted({name for name in weight_map.values() if not (self.folder / name).is_file()})
        if missing:
            raise UserError(
                f"model.name_or_path: {self.folder / file_name} names {len(missing)} missing file(s): "
                f"{', '.join(missing[:3])}. Get the checkpoint again, complete."
            )
        return weight_map

    def _unreadable(self, file_name: str, error: Exception) -> UserError:
        first_line = str(error).strip().partition("\n")[0]
        return UserError(
            f"model.name_or_path: {self.folder / file_name} cannot be read ({first_line}); it is truncated or damaged. "
            "Get the file again."
        )


def read_index(path: Path) -> dict[str, str]:
    """Name of a tensor -> file that holds it, from an .index.json."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"model.name_or_path: {path} has no `weight_map`; get the file again.")
    return dict(weight_map)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint.

    Raises:
        UserError: no such file, or not a JSON object.
    """
    if not path.is_file():
        raise UserError(
            f"model.name_or_path: {path.parent} has no {path.name}; expected the folder of a transformers checkpoint."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"model.name_or_path: {path} is not valid JSON ({error}); get the file again.") from error
    if not isinstance(content, dict):
        raise UserError(f"model.name_or_path: {path} holds no JSON object; get the file again.")
    return content
