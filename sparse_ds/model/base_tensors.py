"""What a model needs of a checkpoint, compared with what is there before anything is read.

Every parameter is filled, and every tensor of the checkpoint is used, a copy of a tied tensor, or known to be of no
use: anything else would train another model than the user thinks.
"""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from sparse_ds.config.errors import UserError
from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.model.filling import BaseTensor
from sparse_ds.model.kinds import KINDS
from sparse_ds.model.stored_nf4 import StoredNF4, find_stored_nf4

logger = logging.getLogger(__name__)

ROTARY_BUFFER = r"rotary_emb\.inv_freq$"
"""Old Llama checkpoints hold these buffers; they are computed from config.json."""


@dataclass(frozen=True)
class BaseSettings:
    """How the frozen base is held."""

    dtype: torch.dtype
    nf4: bool
    double_quantization: bool
    attention: str


def list_base_tensors(model: nn.Module, targets: Collection[str], base: BaseSettings) -> list[BaseTensor]:
    """What is to be read, in the order of the model; a tied tensor once.

    Args:
        model: parameters that are on the meta device are to be read.
        targets: names of the target layers, whose weights are quantized if `base.nf4`.
        base: dtype and quantization.
    """
    quantized = {f"{name}.weight" for name in targets} if base.nf4 else set()
    return [
        BaseTensor(
            name,
            tuple(parameter.shape),
            base.dtype,
            nf4=name in quantized,
            double_quantization=base.double_quantization and name in quantized,
        )
        for name, parameter in model.named_parameters()
        if parameter.device.type == "meta"
    ]


def check_base(
    checkpoint: BaseCheckpoint, tensors: Sequence[BaseTensor], model: PreTrainedModel, unused: Sequence[str] = ()
) -> dict[str, str]:
    """Compare names, shapes and dtypes; only headers are read.

    Args:
        checkpoint: the base model.
        tensors: from `list_base_tensors` of `model`.
        model: as it was then.
        unused: patterns (with * and ?) of tensors that the user knows to be of no use.

    Returns:
        Further copies of tied tensors in the checkpoint: name of the copy -> name of the tensor that it must equal.

    Raises:
        UserError: a tensor is missing, has another shape or is no weight; or the checkpoint holds one too many.
    """
    if missing := [tensor.name for tensor in tensors if tensor.name not in checkpoint]:
        raise UserError(
            f"model.name_or_path: {checkpoint.folder} has no tensor {missing[0]!r}, which the architecture in its "
            f"config.json needs ({len(missing)} missing: {_some(missing)}); the checkpoint is incomplete or of another "
            "model."
        )
    used: set[str] = set()
    for tensor in tensors:
        stored = find_stored_nf4(checkpoint, tensor.name)
        _check_stored(checkpoint, tensor, stored)
        used.update([tensor.name] if stored is None else stored.names)
    tied = _tied_copies(tensors, model)
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []), ROTARY_BUFFER]
    if model.get_output_embeddings() is None:
        # A classifier has a head of its own in its place; parts of it may have come from the checkpoint.
        kind = KINDS[model.config.model_type]
        ignored += kind.other_heads
        used.update(f"{name}.{part}" for name in kind.pretrained_head for part in ("weight", "bias"))
    left: list[str] = []
    for name in checkpoint.names:
        if name in used or name in tied:
            continue
        if any(re.search(pattern, name) for pattern in ignored) or any(fnmatch.fnmatch(name, one) for one in unused):
            logger.info("%s: tensor %s is of no use here", checkpoint.folder, name)
        else:
            left.append(name)
    if left:
        raise UserError(
            f"model.name_or_path: {checkpoint.folder} holds {len(left)} tensor(s) that the architecture in its "
            f"config.json does not have: {_some(left)}. Without them it would be another model: correct config.json, "
            "or list them in model.unused_tensors if they are of no use."
        )
    return {copy: name for copy, name in tied.items() if copy in checkpoint}


def _check_stored(checkpoint: BaseCheckpoint, tensor: BaseTensor, stored_nf4: StoredNF4 | None) -> None:
    stored = checkpoint.stored(tensor.name)
    shape = stored.shape if stored_nf4 is None else stored_nf4.shape
    if shape != tensor.shape:
        raise UserError(
            f"model.name_or_path: tensor {tensor.name!r} of {checkpoint.folder} has shape {shape}, expected "
            f"{tensor.shape} from config.json."
        )
    if stored_nf4 is None and not (stored.dtype.is_floating_point and stored.dtype.itemsize >= 2):
        raise UserError(
            f"model.name_or_path: tensor {tensor.name!r} of {checkpoint.folder} is {stored.dtype}, expected a "
            "floating-point weight of 16 or 32 bits, or bitsandbytes NF4."
        )


def _tied_copies(tensors: Sequence[BaseTensor], model: PreTrainedModel) -> dict[str, str]:
    """Other name of the same parameter -> the name under which it is read."""
    name_of = {id(model.get_parameter(tensor.name)): tensor.name for tensor in tensors}
    return {
        name: name_of[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name_of.get(id(parameter), name) != name
    }


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
