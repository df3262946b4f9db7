"""The files of a base model: which tensor lies in which file, read whole or by ranges of elements.

Formats: one `model.safetensors`, or several with `model.safetensors.index.json`; `pytorch_model.bin` (one or several)
as a fallback, memory-mapped.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from sparse_ds.config.errors import UserError
from sparse_ds.model.tensor_names import names_in_model
from sparse_ds.model.weight_files import BinFile, SafetensorsFile, StoredTensor, UnreadableFileError, WeightFile

logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
SAFETENSORS, BIN = "model.safetensors", "pytorch_model.bin"


class BaseCheckpoint:
    """Reads the weights of a base model from a local folder.

    Tensors go by their names in the model that trains (`model.tensor_names`), whatever the files call them.

    Args:
        folder: with config.json and weights.

    Raises:
        UserError: no config.json, no weights, an index that names a missing file or tensor, a damaged file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / "config.json")
        self.bytes_read = 0
        """Bytes of tensors that were read so far (headers excluded)."""
        self._files: dict[str, WeightFile] = {}
        self._file_of: dict[str, str] = {}
        self._stored_name: dict[str, str] = {}
        for weights in (SAFETENSORS, BIN):
            if (folder / f"{weights}.index.json").is_file():
                stored = self._check_index(f"{weights}.index.json")
            elif (folder / weights).is_file():
                stored = dict.fromkeys(self._open(weights).tensors, weights)
            else:
                continue
            self._stored_name = names_in_model(stored, self.config.get("model_type"))
            self._file_of = {name: stored[stored_name] for name, stored_name in self._stored_name.items()}
            self.is_safetensors = weights == SAFETENSORS
            if not self.is_safetensors:
                logger.warning(
                    "%s has no safetensors weights: reading its %s files instead, which are mapped into memory",
                    folder,
                    BIN,
                )
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
        return sorted(self._file_of, key=lambda name: (self._file_of[name], self.stored(name).offset, name))

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.stored(name).num_bytes for name in self._file_of)

    def stored(self, name: str) -> StoredTensor:
        """Dtype and shape of a tensor; nothing of it is read."""
        return self._files[self._file_of[name]].tensors[self._stored_name[name]]

    def read(self, name: str) -> Tensor:
        """One whole tensor as it is stored, on the CPU."""
        stored = self.stored(name)
        return self.read_range(name, 0, stored.num_elements).view(stored.shape)

    def read_range(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flat tensor: a new tensor [stop - start] on the CPU, in the stored dtype.

        Raises:
            UserError: the file cannot be read there.
        """
        file_name = self._file_of[name]
        try:
            elements = self._files[file_name].read(self._stored_name[name], start, stop)
        except UnreadableFileError as error:
            raise self._unreadable(file_name, error) from error
        self.bytes_read += elements.numel() * elements.element_size()
        return elements

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

    def _open(self, file_name: str) -> WeightFile:
        kind = BinFile if file_name.endswith(".bin") else SafetensorsFile
        try:
            file = self._files[file_name] = kind(self.folder / file_name)
        except UnreadableFileError as error:
            raise self._unreadable(file_name, error) from error
        return file

    def _check_index(self, index_name: str) -> dict[str, str]:
        weight_map = read_index(self.folder / index_name)
        file_names = sorted(set(weight_map.values()))
        # A name with a folder in it is no file of this checkpoint.
        missing = [name for name in file_names if Path(name).name != name or not (self.folder / name).is_file()]
        if missing:
            raise UserError(
                f"model.name_or_path: {self.folder / index_name} names {len(missing)} missing file(s): "
                f"{', '.join(missing[:3])}. Get the checkpoint again, complete."
            )
        for name in file_names:
            self._open(name)
        absent = [name for name, file_name in weight_map.items() if name not in self._files[file_name].tensors]
        if absent:
            raise UserError(
                f"model.name_or_path: {self.folder / weight_map[absent[0]]} has no tensor {absent[0]!r}, which "
                f"{index_name} says ({len(absent)} in all). Index and files are of different checkpoints: get them "
                "again."
            )
        return weight_map

    def _unreadable(self, file_name: str, error: Exception) -> UserError:
        return UserError(
            f"model.name_or_path: {self.folder / file_name} cannot be read ({error}); it is truncated or damaged. "
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
