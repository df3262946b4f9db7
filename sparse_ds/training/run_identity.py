"""What makes two runs the same run: what a checkpoint, and all ranks, must have in common."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from sparse_ds.config import RunConfig, UserError
from sparse_ds.distributed import process_group
from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.training.setup import PreparedModel

FREE_METHOD_KEYS = ("gradient_tile_mib", "gradient_accumulator_limit_gib", "index_storage")
"""Keys of `method` that are about memory and change no number."""


def run_identity(
    config: RunConfig, base: BaseCheckpoint, prepared: PreparedModel, data_fingerprint: str, global_batch_size: int
) -> dict[str, Any]:
    """Plain JSON types.

    Args:
        config: the run.
        base: the base model.
        prepared: the run's model, as it is before training.
        data_fingerprint: of the rows of the training data.
        global_batch_size: samples, or packed rows, of one optimizer step.
    """
    model = config.model
    method = {key: value for key, value in config.to_dict()["method"].items() if key not in FREE_METHOD_KEYS}
    # One spelling of a block; none for single weights. `full` has no such key.
    method.pop("block_size", None)
    if config.method.block_shape != (1, 1):
        method["block_size"] = list(config.method.block_shape)
    return {
        "base": {
            "name": model.name_or_path,
            "revision": model.revision,
            "fingerprint": base.fingerprint(),
            "quantization": model.quantization,
            "double_quantization": model.double_quantization,
            "dtype": model.dtype,
        },
        "task": model.task,
        "labels": None if prepared.classification is None else list(prepared.classification.labels),
        "method": method,
        "momentum": config.optimizer.momentum,
        "active_weights": {name: layer.layout.num_active for name, layer in prepared.layers.items()},
        "data": data_fingerprint,
        # What tells why the fingerprint differs; absent without packing.
        **({"packing": True} if config.data.packing else {}),
        "global_batch_size": global_batch_size,
        "seed": config.train.seed,
    }


def check_same_run(identity: dict[str, Any]) -> None:
    """All ranks carry out the same run on the same data.

    Collectives: one gather of some hashes; every rank must call it.

    Raises:
        UserError: on every rank; says what differs, and on which ranks.
    """
    digests = {
        key: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest() for key, value in identity.items()
    }
    everywhere = process_group.gather(digests)
    for key, digest in everywhere[0].items():
        different = [rank for rank, other in enumerate(everywhere) if other.get(key) != digest]
        if different:
            raise UserError(
                f"the ranks do not carry out the same run: {key} of ranks {different} is not that of rank 0. Give all "
                "hosts the same configuration, base model and data."
            )
