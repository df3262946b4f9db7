"""What both PEFT formats share in writing: a folder that PEFT loads, and that comes back without loss.

    adapter_config.json        PEFT's own, written by its config class
    adapter_model.safetensors  base_model.model.<module>.<indices>, base_model.model.<module>.<values>
                               base_model.model.<tensor>    fp32, what trained as a whole (a head)
    sparse_ds.json             `ExportRecord`: the `AdapterConfig`, and how many entries of each module are real
    README.md                  what it is and how to load it

PEFT computes the number of entries of a matrix from one number of the whole model, so most matrices have a few entries
more than deltas. These come last, at index 0 with value 0: they add nothing, and the record says how many they are.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftConfig
from pydantic import BaseModel, ConfigDict, NonNegativeInt
from torch import Tensor

from sparse_ds.adapter.adapter import Adapter, AdapterConfig, Deltas
from sparse_ds.adapter.peft_formats.model_card import peft_model_card
from sparse_ds.adapter.valid_deltas import deltas_problem, dense_problem
from sparse_ds.checkpoint.atomic_folder import atomic_folder, check_output_apart
from sparse_ds.checkpoint.tensor_file import TensorFile, TensorSpec
from sparse_ds.config.errors import UserError
from sparse_ds.embedded import resolve_model
from sparse_ds.sparse.index_hash import IndexHash

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
RECORD_FILE = "sparse_ds.json"
RECORD_FORMAT = "sparse_ds.peft_export"
PREFIX = "base_model.model."
"""Of every tensor in PEFT's file: `PeftModel.base_model` is the tuner, whose `model` is the base."""
TASK_TYPES = {"causal_lm": "CAUSAL_LM", "sequence_classification": "SEQ_CLS"}


class ExportRecord(BaseModel):
    """The content of `sparse_ds.json`: what PEFT's files cannot say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: str = RECORD_FORMAT
    format_version: int = 1
    sparse_ds_version: str
    index_hash: str
    """`hash_indices` of all modules."""
    config: AdapterConfig
    num_active: dict[str, NonNegativeInt]
    """Module name -> its deltas: the first so many entries of its tensors; the others are at index 0 with value 0.
    A module with none has no tensors."""


@dataclass(frozen=True)
class PeftExport:
    """What an export wrote."""

    folder: Path
    num_deltas: int
    num_padding: int
    """Entries of value 0 that only fill up to what PEFT expects."""
    size_bytes: int
    """Of all files."""
    warnings: tuple[str, ...]
    """What a user has to know of it; logged as well."""


class PeftPlan(NamedTuple):
    """How many entries PEFT expects, and the fields of its config that make it expect them."""

    num_entries: dict[str, int]
    """Module -> N."""
    config_fields: dict[str, Any]


class PeftFormat(ABC):
    """One of PEFT's formats, for writing.

    Attributes:
        peft_type: as in `adapter_config.json`.
        parts: the names of a module's tensors: of indices, of values.
        config_class: PEFT's.
    """

    peft_type: ClassVar[str]
    parts: ClassVar[tuple[str, str]]
    config_class: ClassVar[type[PeftConfig]]

    @abstractmethod
    def plan(self, shapes: Mapping[str, tuple[int, int]], num_active: Mapping[str, int]) -> PeftPlan:
        """At least `num_active` entries, and one, for each of `shapes`.

        Raises:
            UserError: PEFT cannot hold them.
        """

    @abstractmethod
    def stored_indices(self, indices_N: Tensor, shape: tuple[int, int]) -> Tensor:
        """[N] int64 flat indices as PEFT stores them: int32, [N] or [2, N]."""

    @abstractmethod
    def notes(self, config: AdapterConfig) -> list[str]:
        """What the model card says of the numbers."""

    def check(self, config: AdapterConfig) -> None:  # noqa: B027 (a format need not have limits)
        """Raises UserError: something of this adapter cannot be expressed."""

    def warnings(self, config: AdapterConfig) -> list[str]:
        """What a user has to know."""
        return []


def write_peft_folder(
    peft_format: PeftFormat, adapter: Adapter, output: Path | str, *, base_name: str | None, overwrite: bool
) -> PeftExport:
    """Write all files, or none.

    Memory: the entries of one matrix. The adapter is read twice, one module at a time: to count and check, then to
    write.

    Args:
        peft_format: which.
        adapter: what to write.
        output: folder to make.
        base_name: what PEFT finds the base by; None: the name in the adapter's config.
        overwrite: replace an adapter that is already in `output`.

    Raises:
        UserError: `output` exists or is what is being read; the format cannot express the adapter; deltas that are not
            valid. Nothing is left behind.
        RuntimeError: the files could not be written (disk full); nothing is left behind.
    """
    output, config = Path(output), adapter.config
    check_output_apart(output, *adapter.sources)
    _check_no_vectors(config, peft_format.peft_type)
    peft_format.check(config)
    with atomic_folder(output, marker=CONFIG_FILE, overwrite=overwrite) as partial:
        record = _read_all(adapter)
        num_active = record.num_active
        # PEFT gives every matrix that it wraps at least one entry: those with no delta stay unwrapped.
        wrapped = {name: shape for name, shape in config.shapes.items() if num_active[name]} or dict(config.shapes)
        plan = peft_format.plan(wrapped, num_active)
        peft_config = peft_format.config_class(
            task_type=TASK_TYPES[config.task],
            base_model_name_or_path=str(resolve_model(base_name or config.base.name)),
            revision=config.base.revision if base_name is None else None,
            inference_mode=True,
            modules_to_save=sorted({name.rpartition(".")[0] for name in config.dense_shapes}) or None,
            **plan.config_fields,
        )
        # Set here, since PEFT makes a set of a list that it is given, and the same adapter is to give the same file.
        peft_config.target_modules = sorted(wrapped)
        num_deltas, warnings = sum(num_active.values()), peft_format.warnings(config)
        card = peft_model_card(
            adapter,
            peft_type=peft_format.peft_type,
            num_deltas=num_deltas,
            index_hash=record.index_hash,
            notes=[*peft_format.notes(config), *warnings],
        )
        try:
            _write_tensors(partial / WEIGHTS_FILE, peft_format, adapter, plan.num_entries)
            peft_config.save_pretrained(str(partial))
            (partial / RECORD_FILE).write_text(json.dumps(record.model_dump(), indent=2) + "\n", encoding="utf-8")
            (partial / "README.md").write_text(card, encoding="utf-8")
        except OSError as error:
            raise RuntimeError(
                f"Could not write the adapter to '{output}': {error}. Nothing was left there."
            ) from error
        size_bytes = sum(path.stat().st_size for path in partial.iterdir())
    for warning in warnings:
        logger.warning("%s: %s", output, warning)
    return PeftExport(output, num_deltas, sum(plan.num_entries.values()) - num_deltas, size_bytes, tuple(warnings))


def _read_all(adapter: Adapter) -> ExportRecord:
    """Count and check all deltas."""
    config, num_active, hashed = adapter.config, {}, IndexHash()
    for name, deltas in adapter.items():
        on_host = Deltas(deltas.indices.cpu(), deltas.values.cpu())
        if problem := deltas_problem(name, config.shapes[name], on_host):
            raise UserError(f"Adapter '{adapter.folder}': {problem}.")
        hashed.add(name, on_host.indices)
        num_active[name] = on_host.values.numel()
    return ExportRecord(
        sparse_ds_version=version("sparse-ds"),
        index_hash=hashed.hexdigest(),
        # `config` may be that of a native folder, which says more: only what every adapter has is kept.
        config=AdapterConfig(**{name: getattr(config, name) for name in AdapterConfig.model_fields}),
        num_active=num_active,
    )


def _write_tensors(path: Path, peft_format: PeftFormat, adapter: Adapter, num_entries: Mapping[str, int]) -> None:
    config, (indices_part, values_part) = adapter.config, peft_format.parts
    specs = {f"{PREFIX}{name}": TensorSpec(torch.float32, shape) for name, shape in config.dense_shapes.items()}
    for name, num in num_entries.items():
        stored_shape = peft_format.stored_indices(torch.empty(num, dtype=torch.int64, device="meta"), (1, 1)).shape
        specs[f"{PREFIX}{name}.{indices_part}"] = TensorSpec(torch.int32, tuple(stored_shape))
        specs[f"{PREFIX}{name}.{values_part}"] = TensorSpec(torch.float32, (num,))
    with TensorFile(path, specs) as file:
        for name, num in num_entries.items():
            indices_K, values_K = adapter.read(name)
            num_padding = num - values_K.numel()
            assert num_padding >= 0, f"{name}: {num} entries for {values_K.numel()} deltas"
            stored = peft_format.stored_indices(F.pad(indices_K.long(), (0, num_padding)), config.shapes[name])
            file.write(f"{PREFIX}{name}.{indices_part}", stored)
            file.write(f"{PREFIX}{name}.{values_part}", F.pad(values_K, (0, num_padding)))
        for name, shape in config.dense_shapes.items():
            tensor = adapter.read_dense(name)
            if problem := dense_problem(name, shape, tensor):
                raise UserError(f"Adapter '{adapter.folder}': {problem}.")
            file.write(f"{PREFIX}{name}", tensor)


def _check_no_vectors(config: AdapterConfig, peft_type: str) -> None:
    vectors = [name for name, shape in config.shapes.items() if name.endswith(".bias") or shape[1] == 1]
    if vectors:
        raise UserError(
            f"A {peft_type} adapter of PEFT holds deltas of linear layers only; this one has deltas of '{vectors[0]}' "
            f"({len(vectors)} biases or norms). Export it as a merged model or as a native adapter."
        )
