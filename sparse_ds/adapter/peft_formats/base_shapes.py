"""What the files of a PEFT adapter do not say, from its base model, as far as it can be known.

shapes          of the base's tensors
method          "supertuning" or "shira"
density         entries / weights of the wrapped matrices
dtype           that of the base as it is stored; float32 for a float16 base, whose numbers it holds exactly
quantization    that of the base as it is stored: whether PEFT quantized it on the way is not in the files
labels          those of the base's config.json, if they are as many as the head has rows
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig

from sparse_ds.adapter.adapter import AdapterBase, AdapterConfig, tensor_name
from sparse_ds.adapter.peft_formats.writing import TASK_TYPES
from sparse_ds.config.errors import UserError
from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.model.classification_head import HEAD_NAME
from sparse_ds.model.find_base_model import find_base_model
from sparse_ds.model.stored_nf4 import find_stored_nf4

logger = logging.getLogger(__name__)


class PeftBase:
    """The base model of an adapter that PEFT wrote.

    Args:
        folder: of the adapter.
        peft_config: its config.
        base_model: folder or hub name; None: the one that `peft_config` names.

    Raises:
        UserError: no base is named, or it cannot be read.
    """

    def __init__(self, folder: Path, peft_config: PeftConfig, base_model: Path | str | None) -> None:
        named = peft_config.base_model_name_or_path
        name = base_model or named
        if not name:
            raise UserError(f"Adapter '{folder}' names no base model. Give the base that it was trained on.")
        revision = peft_config.revision if base_model is None or str(base_model) == named else None
        try:
            self.checkpoint = BaseCheckpoint(find_base_model(str(name), revision))
        except UserError as error:
            raise UserError(
                f"Adapter '{folder}' does not say the shapes of its matrices, and its base model '{name}' cannot be "
                f"read: {error} Give the base that it was trained on."
            ) from error
        self._folder, self._peft_config, self._name = folder, peft_config, named or str(base_model)

    def shape_of(self, module_name: str) -> tuple[int, int]:
        """[out, in] of a matrix.

        Raises:
            UserError: the base has no such matrix.
        """
        name = tensor_name(module_name)
        if name not in self.checkpoint:
            raise UserError(
                f"Adapter '{self._folder}' has deltas of '{module_name}', and base '{self.checkpoint.folder}' has no "
                f"tensor '{name}'. Give the base that it was trained on."
            )
        stored_nf4 = find_stored_nf4(self.checkpoint, name)
        shape = self.checkpoint.stored(name).shape if stored_nf4 is None else stored_nf4.shape
        if len(shape) != 2:
            raise UserError(f"'{name}' of base '{self.checkpoint.folder}' has shape {list(shape)}, expected a matrix.")
        return shape[0], shape[1]

    def adapter_config(
        self,
        method: str,
        num_entries: Mapping[str, int],
        dense_shapes: dict[str, tuple[int, ...]],
    ) -> AdapterConfig:
        """All that is known.

        Args:
            method: for the config.
            num_entries: of each wrapped module.
            dense_shapes: of what trained as a whole.

        Raises:
            UserError: more entries than weights, or a task that this project does not have.
        """
        shapes = {name: self.shape_of(name) for name in num_entries}
        for name, (rows, cols) in shapes.items():
            if num_entries[name] > rows * cols:
                raise UserError(
                    f"Adapter '{self._folder}' has {num_entries[name]} values for '{name}', which has {rows} x {cols} "
                    f"weights in base '{self.checkpoint.folder}'. Give the base that it was trained on."
                )
        return AdapterConfig(
            method=method,
            density=sum(num_entries.values()) / sum(rows * cols for rows, cols in shapes.values()),
            base=self._base(next(iter(shapes))),
            shapes=shapes,
            dense_shapes=dense_shapes,
            **self._task(dense_shapes),
        )

    def _base(self, module_name: str) -> AdapterBase:
        name = tensor_name(module_name)
        stored_nf4 = find_stored_nf4(self.checkpoint, name)
        dtype = str(self.checkpoint.stored(name).dtype)
        if stored_nf4 is not None:
            dtype = str(self.checkpoint.config.get("dtype", self.checkpoint.config.get("torch_dtype")))
        return AdapterBase(
            name=self._name,
            revision=self._peft_config.revision,
            quantization="none" if stored_nf4 is None else "nf4",
            double_quantization=stored_nf4 is not None and stored_nf4.offset is not None,
            dtype="bfloat16" if dtype.endswith("bfloat16") else "float32",
        )

    def _task(self, dense_shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        task_type = self._peft_config.task_type or TASK_TYPES["causal_lm"]
        task = {peft_name: name for name, peft_name in TASK_TYPES.items()}.get(task_type)
        if task is None:
            expected = " or ".join(TASK_TYPES.values())
            raise UserError(f"Adapter '{self._folder}' has task_type {task_type!r}, expected {expected}.")
        if task == "causal_lm":
            return {"task": task}
        head, config = f"{HEAD_NAME}.weight", self.checkpoint.config
        if head not in dense_shapes:
            raise UserError(f"Adapter '{self._folder}' is of a classification, and holds no '{head}'.")
        num_labels, names = dense_shapes[head][0], config.get("id2label") or {}
        labels = [f"LABEL_{row}" for row in range(num_labels)]  # transformers' own names
        if sorted(names) == sorted(map(str, range(num_labels))):
            labels = [str(names[str(row)]) for row in range(num_labels)]
        pad_token_id = config.get("pad_token_id")
        if pad_token_id is None:
            ends = config.get("eos_token_id")
            pad_token_id = (ends[0] if isinstance(ends, list) else ends) or 0
            logger.warning(
                "%s: the base's config.json has no pad_token_id, which a classification needs; taken is %d",
                self._folder,
                pad_token_id,
            )
        return {"task": task, "labels": tuple(labels), "pad_token_id": pad_token_id}
