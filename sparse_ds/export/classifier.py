"""What config.json says of a classifier, so that plain transformers loads it as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES


def classifier_config(model_type: str, labels: Sequence[str], pad_token_id: int) -> dict[str, Any]:
    """The entries that differ from the base model's.

    Args:
        model_type: as in the base's config.json.
        labels: in the order of the head's rows.
        pad_token_id: what the run padded with.
    """
    return {
        "architectures": [MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[model_type]],
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
        "pad_token_id": pad_token_id,
        "problem_type": "single_label_classification",
    }
