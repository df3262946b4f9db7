"""`checkpoint.json`: what is in a checkpoint, and the hashes by which damage is seen. See docs/checkpoints.md."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparse_ds.checkpoint.tensor_file import DTYPES
from sparse_ds.config.errors import UserError

INDEX_FILE = "checkpoint.json"
TRAINER_STATE_FILE = "trainer_state.json"
FORMAT_NAME, FORMAT_VERSION = "sparse_ds.checkpoint", 2
CHECKSUM_KEY = "sha256"
"""In the index: the hash of the rest of it."""
LARGEST_INDEX_BYTES = 2**28
"""An index has about 150 bytes per tensor: this is room for more than a million tensors."""

Count = Annotated[int, Field(ge=0, lt=2**48)]


class TensorEntry(BaseModel):
    """One global tensor. File i (from 0) holds elements [i * slice_elements, (i + 1) * slice_elements) of it, as far as
    there are any."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    dtype: str
    """As safetensors names it."""
    num_elements: Count
    slice_elements: Annotated[Count, Field(ge=1)]

    def slice_of_file(self, file: int) -> tuple[int, int]:
        """(first element, number of elements) of what file `file` holds."""
        start = min(file * self.slice_elements, self.num_elements)
        return start, min(self.slice_elements, self.num_elements - start)


class CheckpointIndex(BaseModel):
    """The content of checkpoint.json."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: str = FORMAT_NAME
    format_version: int = FORMAT_VERSION
    step: Count
    """Optimizer steps done."""
    identity: dict[str, Any]
    """What must be the same for a run to go on from here: base model, method, targets, data."""
    run_state: dict[str, Any]
    """What the run needs besides tensors: scheduler, counters, what was measured before the first step."""
    num_state_files: Annotated[Count, Field(ge=1, lt=100_000)]
    tensors: dict[str, TensorEntry]
    files: dict[str, str]
    """File name -> sha256; the names are `state_files` and trainer_state.json."""

    @property
    def state_files(self) -> list[str]:
        """Names of the files with tensors, in the order of their slices."""
        return [state_file(number, self.num_state_files) for number in range(self.num_state_files)]


def state_file(number: int, num_files: int) -> str:
    """Name of file `number` (from 0) of `num_files`."""
    return f"state-{number + 1:05d}-of-{num_files:05d}.safetensors"


def index_text(index: CheckpointIndex) -> str:
    """The text of the file, with the hash of the content."""
    content = index.model_dump()
    return json.dumps({**content, CHECKSUM_KEY: _checksum(content)}, indent=2) + "\n"


def read_index(folder: Path) -> CheckpointIndex:
    """Read and check the index; nothing else of the folder is looked at.

    Raises:
        UserError: it is missing, damaged, of another format or version, or does not fit together.
    """
    path = folder / INDEX_FILE
    damaged = f"checkpoint {folder}: {INDEX_FILE} is damaged or of another format. Use another checkpoint."
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_INDEX_BYTES + 1)
        if len(text) > LARGEST_INDEX_BYTES:
            raise UserError(damaged)
        content = json.loads(text)
    except OSError as error:
        raise UserError(f"checkpoint {folder}: has no readable {INDEX_FILE} ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise UserError(damaged) from error
    if not isinstance(content, dict) or not isinstance(content.get("format_version"), int):
        raise UserError(damaged)
    if content.get("format") != FORMAT_NAME or content["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"checkpoint {folder}: format {content.get('format')} version {content['format_version']}, expected "
            f"{FORMAT_NAME} version {FORMAT_VERSION}. Use the version of sparse_ds that wrote it."
        )
    if content.pop(CHECKSUM_KEY, None) != _checksum(content):
        raise UserError(damaged)
    try:
        index = CheckpointIndex.model_validate(content)
    except ValidationError as error:
        raise UserError(damaged) from error
    known_dtypes = all(entry.dtype in DTYPES.values() for entry in index.tensors.values())
    if not known_dtypes or index.files.keys() != {*index.state_files, TRAINER_STATE_FILE}:
        raise UserError(damaged)
    return index


def sha256_of_file(path: Path) -> str:
    """Of all its bytes. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
