"""Merge an adapter into its base model: a dense checkpoint that plain transformers loads.

The merged model is the model that was trained, number for number. For each target matrix, with M the dtype of the
training (`bfloat16` or `float32`):

    base = M(w)                                  quantization none
    base = dequantize(nf4(M(w)))                 quantization nf4: the weights the deltas were trained on, not the
                                                 original ones; same code as in training
    merged[indices] = M( fp32(base[indices]) + fp32(values) )

and every other tensor is M(w); what trained as a whole (the head of a classification) is as it was trained. At last all
are cast to the dtype of the output, which is exact for output = M and for bfloat16 -> float32
(not for the head, which is fp32: it is exact in float32 only).

The base is streamed: memory is one output shard and a few copies of one matrix. No process group is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from sparse_ds.adapter.adapter import Adapter, Deltas, tensor_name
from sparse_ds.adapter.native import load_adapter
from sparse_ds.config.errors import UserError
from sparse_ds.export.checkpoint_writer import DTYPES, WrittenCheckpoint, write_checkpoint
from sparse_ds.export.classifier import classifier_config
from sparse_ds.export.model_card import merged_model_card
from sparse_ds.kernels.apply_deltas import apply_deltas_, hidden_counts
from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.model.build import read_architecture
from sparse_ds.model.find_base_model import find_base_model
from sparse_ds.model.frozen_weight import read_frozen


@dataclass(frozen=True)
class MergeReport:
    """What a merge did."""

    checkpoint: WrittenCheckpoint
    num_deltas: int
    num_nonzero_deltas: int
    num_hidden_deltas: int
    """Non-zero deltas that the rounding to the training dtype hides: the merged weight equals the base weight."""


def merge_adapter(
    base: str | Path,
    adapter: str | Path | Adapter,
    output: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "bfloat16",
    max_shard_size: str | int = "5GB",
    tokenizer: str | Path | None = None,
    device: str = "cpu",
    overwrite: bool = False,
) -> MergeReport:
    """Write base + adapter as a dense checkpoint folder; all of it or nothing.

    Args:
        base: folder or hub name of the checkpoint that the adapter was trained on (16 bits or NF4).
        adapter: folder of the adapter, or the result of `load_adapter`.
        output: folder to make.
        revision: of a hub base. None: the one the adapter names, if it names the same base.
        dtype: "bfloat16", "float16" or "float32", of the output.
        max_shard_size: "5GB", "500MB" or a number of bytes.
        tokenizer: folder to take the tokenizer and chat template from. None: the base.
        device: where matrices are quantized and merged; give the kind of device of the training.
        overwrite: replace a checkpoint that is already in `output`.

    Raises:
        UserError: an adapter that is damaged or of another base (names or shapes), an unreadable base, an unusable
            output folder. Raised before anything is written.
        RuntimeError: not enough room on the disk, or writing failed; nothing is left behind.
    """
    adapter = adapter if isinstance(adapter, Adapter) else load_adapter(adapter)
    trained = adapter.config.base
    if revision is None and str(base) == trained.name:
        revision = trained.revision
    checkpoint = BaseCheckpoint(find_base_model(str(base), revision))
    layout = _layout(checkpoint, adapter)
    _check_fits(adapter, checkpoint, layout)
    _check_output_apart(Path(output), checkpoint.folder, adapter.folder)
    merge = _Merge(checkpoint, layout, adapter, device)
    written = write_checkpoint(
        output,
        layout,
        merge.read,
        base_folder=checkpoint.folder,
        tokenizer_folder=checkpoint.folder if tokenizer is None else Path(tokenizer),
        model_card=lambda: merged_model_card(
            adapter, num_deltas=merge.num_deltas, num_hidden_deltas=merge.num_hidden_deltas, dtype=dtype
        ),
        config_changes=_config_changes(checkpoint, adapter),
        dtype=dtype,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )
    return MergeReport(written, merge.num_deltas, merge.num_nonzero_deltas, merge.num_hidden_deltas)


class _Merge:
    """Hands out the tensors of the merged model and counts what it merged."""

    def __init__(self, checkpoint: BaseCheckpoint, layout: dict[str, Tensor], adapter: Adapter, device: str) -> None:
        self._checkpoint = checkpoint
        self._shapes = {name: tuple(tensor.shape) for name, tensor in layout.items()}
        self._adapter = adapter
        self._device = device
        self._dtype = DTYPES[adapter.config.base.dtype]
        self._module_by_tensor = {tensor_name(name): name for name in adapter.config.shapes}
        self.num_deltas = 0
        self.num_nonzero_deltas = 0
        self.num_hidden_deltas = 0

    @torch.no_grad()
    def read(self, name: str) -> Tensor:
        if name in self._adapter.config.dense_shapes:
            return self._adapter.read_dense(name)
        trained, shape = self._adapter.config.base, self._shapes[name]
        is_target = name in self._module_by_tensor
        weight_OI = read_frozen(
            self._checkpoint,
            name,
            shape,
            self._dtype,
            nf4=is_target and len(shape) > 1 and trained.quantization == "nf4",
            double_quantization=trained.double_quantization,
            device=self._device if is_target else "cpu",
        )
        if not is_target:
            return weight_OI
        indices_K, values_K = self._adapter.read(self._module_by_tensor[name])
        deltas = Deltas(indices_K.to(self._device), values_K.to(self._device))
        self._count(weight_OI, deltas)
        return apply_deltas_(weight_OI, deltas.indices, deltas.values)

    def _count(self, weight_OI: Tensor, deltas: Deltas) -> None:
        weights_K = weight_OI.view(-1).index_select(0, deltas.indices)
        num_hidden, num_nonzero = hidden_counts(weights_K, deltas.values)
        self.num_deltas += deltas.values.numel()
        self.num_nonzero_deltas += num_nonzero
        self.num_hidden_deltas += num_hidden


def _config_changes(checkpoint: BaseCheckpoint, adapter: Adapter) -> dict[str, Any]:
    labels, pad_token_id = adapter.config.labels, adapter.config.pad_token_id
    if labels is None or pad_token_id is None:
        return {}
    return classifier_config(checkpoint.config["model_type"], labels, pad_token_id)


def _layout(checkpoint: BaseCheckpoint, adapter: Adapter) -> dict[str, Tensor]:
    """Parameter name -> meta tensor, of the architecture in config.json; tied parameters once, stale buffers never."""
    config = read_architecture(checkpoint)
    model_class = AutoModelForCausalLM
    if adapter.config.labels is not None:
        model_class = AutoModelForSequenceClassification
        config.num_labels = len(adapter.config.labels)
    with torch.device("meta"):
        model: PreTrainedModel = model_class.from_config(config)
    return dict(model.named_parameters())


def _check_fits(adapter: Adapter, checkpoint: BaseCheckpoint, layout: dict[str, Tensor]) -> None:
    dense = adapter.config.dense_shapes
    if missing := [name for name in layout if name not in checkpoint and name not in dense]:
        raise UserError(
            f"Base '{checkpoint.folder}' has no tensor '{missing[0]}', which the architecture in its config.json needs "
            f"({len(missing)} are missing). Get the checkpoint again, complete."
        )
    trained_on = f"Adapter '{adapter.folder}' was trained on '{adapter.config.base.name}'"
    trained_shapes = {tensor_name(name): shape for name, shape in adapter.config.shapes.items()}
    for name, shape in sorted({**trained_shapes, **dense}.items()):
        found_shape = tuple(layout[name].shape) if name in layout else ()
        found = f"shape {list(found_shape)}" if name in layout else "no such parameter of its own"
        if len(found_shape) == 1 and name in trained_shapes:
            found_shape = (*found_shape, 1)
        if found_shape != shape:
            raise UserError(
                f"{trained_on}, where '{name}' has shape {list(shape)}; base '{checkpoint.folder}' has {found}. "
                "Give the base that it was trained on."
            )


def _check_output_apart(output: Path, *sources: Path) -> None:
    """Overwriting `output` must never delete what is being read."""
    output = output.resolve()
    for source in sources:
        if source.resolve() == output or output in source.resolve().parents:
            raise UserError(f"Output folder '{output}' holds '{source}', which is being read. Give another path.")
