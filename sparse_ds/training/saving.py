"""Gather what was trained and let rank 0 write it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sparse_ds.adapter.adapter import AdapterBase, AdapterConfig, tensor_name
from sparse_ds.adapter.native import IndexEncoding, StoredAdapterConfig, save_adapter
from sparse_ds.config import RunConfig
from sparse_ds.distributed import process_group
from sparse_ds.distributed.zero3_partitions import MasterWeights, full_shape, gather_partitions, local_partition
from sparse_ds.export.checkpoint_writer import write_checkpoint
from sparse_ds.export.classifier import classifier_config
from sparse_ds.export.model_card import dense_model_card
from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.model.weights_hash import weights_hash
from sparse_ds.sparse.index_storage import Piece, indices_of_pieces, stored_pieces
from sparse_ds.training.setup import PreparedModel


def describe_adapter(config: RunConfig, prepared: PreparedModel, base: BaseCheckpoint) -> AdapterConfig | None:
    """What is known of the run's adapter besides its numbers; None where every weight trains. Collectives: none."""
    if not prepared.layers:
        return None
    shapes = {name: (layer.layout.num_rows, layer.layout.num_cols) for name, layer in prepared.layers.items()}
    classification = prepared.classification
    return AdapterConfig(
        method=config.method.name,
        density=config.method.density,
        base=AdapterBase(
            name=config.model.name_or_path,
            revision=config.model.revision,
            quantization=config.model.quantization,
            double_quantization=config.model.double_quantization,
            dtype=config.model.dtype,
            weights_hash=weights_hash(
                base, {tensor_name(name): shape for name, shape in shapes.items()}, getattr(torch, config.model.dtype)
            ),
        ),
        shapes=shapes,
        birth_steps={0: sum(layer.num_active for layer in prepared.layers.values())},
        dense_shapes={name: full_shape(parameter) for name, parameter in prepared.dense_parameters.items()},
        task=config.model.task,
        labels=None if classification is None else classification.labels,
        pad_token_id=None if classification is None else classification.pad_token_id,
        instruction=config.data.instruction,
    )


def save_deltas(
    adapter_config: AdapterConfig | None,
    prepared: PreparedModel,
    master: MasterWeights,
    folder: Path,
    device: torch.device,
    *,
    index_encoding: IndexEncoding,
) -> StoredAdapterConfig | None:
    """Write the adapter; returns what was stored on rank 0, None elsewhere.

    `adapter_config` is used on rank 0 only.

    Memory: one tensor's deltas on `device`; all deltas on rank 0's host (8 bytes per active weight).
    Collectives: one all-gather per tensor, then an agreement on success; every rank must call it.
    """
    layers = prepared.layers
    gathered: list[tuple[str, Tensor, Tensor]] = []
    dense: dict[str, Tensor] = {}
    for name, layer in layers.items():
        pieces = [*stored_pieces(layer), Piece(layer.values, master.view(layer.values))]
        *whole, values_K = gather_partitions(
            [piece.parameter for piece in pieces],
            [piece.partition for piece in pieces],
            device,
            [piece.unit for piece in pieces],
        )
        if process_group.rank() == 0:
            indices_U = indices_of_pieces(layer, whole).cpu()
            indices_K, values_K = layer.layout.sorted_weights(indices_U, values_K[: layer.num_active].cpu())
            gathered.append((name, indices_K, values_K))
    for name, parameter in prepared.dense_parameters.items():
        (flat,) = gather_partitions([parameter], [master.view(parameter)], device)
        if process_group.rank() == 0:
            dense[name] = flat.view(full_shape(parameter)).cpu()
    stored = None
    with process_group.agreement("writing the adapter"):
        if process_group.rank() == 0:
            assert adapter_config is not None
            stored = save_adapter(
                folder,
                gathered,
                config=adapter_config,
                dense=dense,
                index_encoding=index_encoding,
                overwrite=True,
            )
    return stored


def save_dense_model(
    config: RunConfig,
    prepared: PreparedModel,
    folder: Path,
    base_folder: Path,
    device: torch.device,
    *,
    tokenizer_folder: Path,
) -> None:
    """Write a fully trained model (method `full`).

    Memory: one tensor on `device`; the whole model in its dtype on rank 0's host.
    Collectives: one all-gather per tensor, then an agreement on success; every rank must call it.
    """
    tensors: dict[str, Tensor] = {}
    model, classification = prepared.model, prepared.classification
    for name, parameter in model.named_parameters():
        (flat,) = gather_partitions([parameter], [local_partition(parameter)], device)
        if process_group.rank() == 0:
            tensors[name] = flat.view(full_shape(parameter)).cpu()
    with process_group.agreement("writing the model"):
        if process_group.rank() == 0:
            write_checkpoint(
                folder,
                tensors,
                tensors.__getitem__,
                base_folder=base_folder,
                tokenizer_folder=tokenizer_folder,
                model_card=dense_model_card(config.model.name_or_path, task=config.model.task),
                config_changes={}
                if classification is None
                else classifier_config(model.config.model_type, classification.labels, classification.pad_token_id),
                dtype=config.export.merged_dtype,
                max_shard_size=config.export.max_shard_size,
                overwrite=True,
            )
