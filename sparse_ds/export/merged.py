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

With `base_weights` "original" the deltas of a training over NF4 are added to M(w) instead: another model than the one
that was trained, without the error of quantization. The report tells how large that error is beside what was trained.

The base is streamed: memory is a few copies of one tensor. No process group is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from sparse_ds.adapter.adapter import Adapter, Deltas, tensor_name
from sparse_ds.adapter.opening import open_adapter
from sparse_ds.checkpoint.atomic_folder import check_output_apart
from sparse_ds.config.errors import UserError
from sparse_ds.export.checkpoint_writer import DTYPES, WrittenCheckpoint, write_checkpoint
from sparse_ds.export.classifier import classifier_config
from sparse_ds.export.model_card import merged_model_card
from sparse_ds.export.quantization_error import MatrixReport, describe_error, difference_norm, report_json
from sparse_ds.kernels.apply_deltas import apply_deltas_, hidden_counts
from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.model.build import read_architecture
from sparse_ds.model.find_base_model import find_base_model
from sparse_ds.model.frozen_weight import nf4_round_trip, read_frozen
from sparse_ds.model.stored_nf4 import find_stored_nf4
from sparse_ds.model.weights_hash import weights_hash
from sparse_ds.monitor.progress import ProgressBytes

REPORT_FILE = "merge_report.json"
"""Beside the weights: `MatrixReport` of every module."""
BaseWeights = Literal["dequantized", "original"]


@dataclass(frozen=True)
class MergeReport:
    """What a merge did."""

    checkpoint: WrittenCheckpoint
    matrices: dict[str, MatrixReport]
    """By module name."""
    base_weights: BaseWeights

    @property
    def error(self) -> str | None:
        """One sentence on the error of a 4-bit base; None where there is none. A warning with the original weights."""
        return describe_error(self.matrices, merged_into_original=self.base_weights == "original")

    @property
    def num_deltas(self) -> int:
        return sum(each.num_deltas for each in self.matrices.values())

    @property
    def num_nonzero_deltas(self) -> int:
        return sum(each.num_nonzero_deltas for each in self.matrices.values())

    @property
    def num_hidden_deltas(self) -> int:
        """Non-zero deltas that the rounding to the training dtype hides: the merged weight equals the base weight."""
        return sum(each.num_hidden_deltas for each in self.matrices.values())


def merge_adapter(
    base: str | Path,
    adapter: str | Path | Adapter,
    output: str | Path,
    *,
    revision: str | None = None,
    base_weights: BaseWeights = "dequantized",
    dtype: str = "bfloat16",
    max_shard_size: str | int = "5GB",
    tokenizer: str | Path | None = None,
    device: str = "cpu",
    allow_other_base: bool = False,
    overwrite: bool = False,
    show_progress: bool = False,
) -> MergeReport:
    """Write base + adapter as a dense checkpoint folder; all of it or nothing.

    Args:
        base: folder or hub name of the checkpoint that the adapter was trained on (16 bits or NF4).
        adapter: folder of the adapter or of a checkpoint of its run, or an adapter.
        output: folder to make.
        revision: of a hub base. None: the one the adapter names, if it names the same base.
        base_weights: of a training over NF4: "dequantized" or "original", see above.
        dtype: "bfloat16", "float16" or "float32", of the output.
        max_shard_size: "5GB", "500MB" or a number of bytes.
        tokenizer: folder to take the tokenizer and chat template from. None: the base.
        device: where matrices are quantized and merged; give the kind of device of the training.
        allow_other_base: merge into a base with other weights than those of the training, if the shapes are the same.
        overwrite: replace a checkpoint that is already in `output`.
        show_progress: with a bar.

    Raises:
        UserError: an adapter that is damaged or of another base (names, shapes or weights), an unreadable base, an
            unusable output folder. Raised before anything is written.
        RuntimeError: not enough room on the disk, or writing failed; nothing is left behind.
    """
    adapter = adapter if isinstance(adapter, Adapter) else open_adapter(adapter)
    trained = adapter.config.base
    if revision is None and str(base) == trained.name:
        revision = trained.revision
    checkpoint = BaseCheckpoint(find_base_model(str(base), revision))
    layout = _layout(checkpoint, adapter)
    _check_fits(adapter, checkpoint, layout)
    if not allow_other_base:
        _check_same_weights(adapter, checkpoint)
    if base_weights == "original":
        _check_has_original(adapter, checkpoint)
    check_output_apart(Path(output), checkpoint.folder, *adapter.sources)
    with ProgressBytes("merging", checkpoint.size_bytes, enabled=show_progress) as progress:
        merge = _Merge(checkpoint, layout, adapter, base_weights, device, progress)
        written = write_checkpoint(
            output,
            layout,
            merge.read,
            base_folder=checkpoint.folder,
            tokenizer_folder=checkpoint.folder if tokenizer is None else Path(tokenizer),
            model_card=lambda: merged_model_card(
                adapter,
                num_deltas=sum(each.num_deltas for each in merge.matrices.values()),
                num_hidden_deltas=sum(each.num_hidden_deltas for each in merge.matrices.values()),
                dtype=dtype,
                base_weights=base_weights,
            ),
            config_changes=_config_changes(checkpoint, adapter),
            more_files=lambda: {REPORT_FILE: {"base_weights": base_weights, "matrices": report_json(merge.matrices)}},
            dtype=dtype,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
        )
    return MergeReport(written, merge.matrices, base_weights)


class _Merge:
    """Hands out the tensors of the merged model and reports what it merged."""

    def __init__(
        self,
        checkpoint: BaseCheckpoint,
        layout: dict[str, Tensor],
        adapter: Adapter,
        base_weights: BaseWeights,
        device: str,
        progress: ProgressBytes,
    ) -> None:
        self._checkpoint = checkpoint
        self._shapes = {name: tuple(tensor.shape) for name, tensor in layout.items()}
        self._adapter = adapter
        self._base_weights = base_weights
        self._device = device
        self._progress = progress
        self._dtype = DTYPES[adapter.config.base.dtype]
        self._module_by_tensor = {tensor_name(name): name for name in adapter.config.shapes}
        self.matrices: dict[str, MatrixReport] = {}

    @torch.no_grad()
    def read(self, name: str) -> Tensor:
        if name in self._adapter.config.dense_shapes:
            return self._adapter.read_dense(name)
        shape, module_name = self._shapes[name], self._module_by_tensor.get(name)
        device = self._device if module_name else "cpu"
        # What the checkpoint holds in NF4 comes dequantized.
        weight_OI = read_frozen(self._checkpoint, name, shape, self._dtype, nf4=False, device=device)
        self._progress.add(self._checkpoint.stored(name).num_bytes)
        if module_name is None:
            return weight_OI
        trained, error_norm = self._adapter.config.base, None
        is_nf4 = trained.quantization == "nf4" and len(shape) > 1
        if is_nf4 and find_stored_nf4(self._checkpoint, name) is None:
            dequantized_OI = nf4_round_trip(weight_OI, double_quantization=trained.double_quantization)
            error_norm = difference_norm(weight_OI, dequantized_OI)
            if self._base_weights == "dequantized":
                weight_OI = dequantized_OI
        indices_K, values_K = self._adapter.read(module_name)
        deltas = Deltas(indices_K.to(device), values_K.to(device))
        self.matrices[module_name] = _report(weight_OI, deltas, error_norm)
        return apply_deltas_(weight_OI, deltas.indices, deltas.values)


def _report(weight_OI: Tensor, deltas: Deltas, error_norm: float | None) -> MatrixReport:
    weights_K = weight_OI.view(-1).index_select(0, deltas.indices)
    num_hidden, num_nonzero = hidden_counts(weights_K, deltas.values)
    return MatrixReport(
        num_weights=weight_OI.numel(),
        num_deltas=deltas.values.numel(),
        num_nonzero_deltas=num_nonzero,
        num_hidden_deltas=num_hidden,
        deltas_norm=float(torch.linalg.vector_norm(deltas.values, dtype=torch.float64)),
        quantization_error_norm=error_norm,
    )


def _config_changes(checkpoint: BaseCheckpoint, adapter: Adapter) -> dict[str, Any]:
    labels, pad_token_id = adapter.config.labels, adapter.config.pad_token_id
    changes: dict[str, Any] = {}
    if labels is not None and pad_token_id is not None:
        changes = classifier_config(checkpoint.config["model_type"], labels, pad_token_id)
    return {**changes, **adapter.model_config}


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


def _check_same_weights(adapter: Adapter, checkpoint: BaseCheckpoint) -> None:
    """Two models of one architecture differ in their weights only."""
    trained = adapter.config.base
    shapes = {tensor_name(name): shape for name, shape in adapter.config.shapes.items()}
    found = weights_hash(checkpoint, shapes, DTYPES[trained.dtype])
    if None not in (found, trained.weights_hash) and found != trained.weights_hash:
        raise UserError(
            f"Adapter '{adapter.folder}' was trained on '{trained.name}', whose weights have the hash "
            f"{trained.weights_hash}; those of base '{checkpoint.folder}' have {found}. Give the base that it was "
            "trained on, or allow another one (`--allow-other-base`)."
        )


def _check_has_original(adapter: Adapter, checkpoint: BaseCheckpoint) -> None:
    names = [tensor_name(name) for name in adapter.config.shapes]
    if stored := [name for name in names if find_stored_nf4(checkpoint, name) is not None]:
        raise UserError(
            f"Base '{checkpoint.folder}' holds '{stored[0]}' in NF4 ({len(stored)} matrices are): it has no original "
            "weights. Give the 16-bit checkpoint, or merge into the dequantized weights."
        )
