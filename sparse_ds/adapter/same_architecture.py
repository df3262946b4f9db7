"""Whether two checkpoints are of one model, and which of their tensors can differ by deltas."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from sparse_ds.adapter.adapter import tensor_name
from sparse_ds.config.errors import UserError
from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.model.base_tensors import BaseSettings, check_base, list_base_tensors
from sparse_ds.model.build import empty_model, read_architecture
from sparse_ds.model.classification_head import HEAD_NAME, Classification
from sparse_ds.model.targets import ALL_LINEAR, find_norms, find_targets

logger = logging.getLogger(__name__)

HEAD = f"{HEAD_NAME}.weight"
VOCABULARY_HEAD = "lm_head.weight"
NOT_ARCHITECTURE = {
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "problem_type"),
    *("id2label", "label2id", "num_labels", "bos_token_id", "eos_token_id", "pad_token_id"),
}
"""Entries of config.json that may differ between two forms of one model."""


@dataclass(frozen=True)
class ComparedTensors:
    """What of two checkpoints is compared."""

    shapes: dict[str, tuple[int, int]]
    """What can have deltas, by the names of `AdapterConfig.shapes`: linear layers in blocks, their biases, norms."""
    others: list[str]
    """Tensors that have no deltas."""
    classification: Classification | None
    """Of the fine-tuned checkpoint, if it is a classifier; its head is one of `others`."""


def compare_architectures(base: BaseCheckpoint, tuned: BaseCheckpoint) -> ComparedTensors:
    """Compare names and shapes; only headers are read. Other entries of config.json that differ are warned of.

    Args:
        base: a causal language model.
        tuned: the same, or a classifier that was made of it.

    Raises:
        UserError: one is incomplete or has tensors that its config.json does not explain; or they are of different
            models.
    """
    classification = _classification_of(tuned)
    settings = BaseSettings(torch.float32, nf4=False, double_quantization=False, attention="eager")
    shapes = []
    for checkpoint, task in ((base, None), (tuned, classification)):
        model = empty_model(checkpoint, settings, task)
        tensors = list_base_tensors(model, (), settings)
        check_base(checkpoint, tensors, model)
        shapes.append({tensor.name: tensor.shape for tensor in tensors})
    base_shapes, tuned_shapes = shapes
    if classification is not None:
        base_shapes.pop(VOCABULARY_HEAD, None)
        base_shapes[HEAD] = tuned_shapes[HEAD]
    for name in sorted(base_shapes.keys() | tuned_shapes.keys()):
        found = [str(list(one[name])) if name in one else "no such tensor" for one in (base_shapes, tuned_shapes)]
        if found[0] != found[1]:
            raise UserError(
                f"The checkpoints are of different models: '{name}' is {found[0]} in '{base.folder}' and {found[1]} in "
                f"'{tuned.folder}'. Give a model and the base that it was tuned from."
            )
    configs = [read_architecture(checkpoint).to_dict() for checkpoint in (base, tuned)]
    differing = sorted(
        key
        for key in configs[0].keys() | configs[1].keys()
        if key not in NOT_ARCHITECTURE and configs[0].get(key) != configs[1].get(key)
    )
    if differing:
        logger.warning(
            "config.json of %s and %s differ in %s; an adapter holds weights only",
            base.folder,
            tuned.folder,
            ", ".join(differing),
        )
    targets = find_targets(model, ALL_LINEAR)
    norms = find_norms(model)
    names: dict[str, tuple[int, int]] = {}
    for name in [*targets, *norms, *(f"{target}.bias" for target in targets)]:
        if tensor_name(name) in tuned_shapes:
            shape = tuned_shapes[tensor_name(name)]
            names[name] = (shape[0], shape[1] if len(shape) > 1 else 1)
    deltas = {tensor_name(name) for name in names}
    return ComparedTensors(names, [name for name in tuned_shapes if name not in deltas], classification)


def _classification_of(tuned: BaseCheckpoint) -> Classification | None:
    if not str((tuned.config.get("architectures") or [""])[0]).endswith("ForSequenceClassification"):
        return None
    config = read_architecture(tuned)
    if config.pad_token_id is None:
        raise UserError(
            f"'{tuned.folder / 'config.json'}' is of a classifier and has no pad_token_id. Add the number of the token "
            "that it was trained with."
        )
    labels = tuple(config.id2label[row] for row in range(config.num_labels))
    return Classification(labels, config.pad_token_id)
