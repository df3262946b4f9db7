"""Names of tensors in a checkpoint -> their names in the model that trains.

A checkpoint may have been saved from the model with a head, or from the base model alone, whose names lack the prefix
(sentence encoders mostly); and old files of BERT name the vectors of LayerNorm as TensorFlow does:

    bert.encoder.layer.0.output.dense.weight      the same
    encoder.layer.0.output.dense.weight           bert.encoder.layer.0.output.dense.weight
    bert.embeddings.LayerNorm.gamma, .beta        bert.embeddings.LayerNorm.weight, .bias

transformers reads such files by the same rules.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from sparse_ds.model.kinds import KINDS

_TENSORFLOW_NAMES = (
    (re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"),
    (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"),
)


def names_in_model(stored: Collection[str], model_type: str | None) -> dict[str, str]:
    """Name in the model -> name in the checkpoint.

    Args:
        stored: all names in the checkpoint.
        model_type: of config.json; one that is not supported changes no name.
    """
    kind = KINDS.get(model_type or "")
    if kind is None:
        return {name: name for name in stored}
    prefix = f"{kind.prefix}."
    is_bare = not any(name.startswith(prefix) for name in stored)
    found: dict[str, str] = {}
    for name in stored:
        renamed = f"{prefix}{name}" if is_bare else name
        for pattern, replacement in _TENSORFLOW_NAMES:
            renamed = pattern.sub(replacement, renamed)
        # Of two that would get one name the second keeps its own, and will be reported as one too many.
        found[name if renamed in found else renamed] = name
    return found
