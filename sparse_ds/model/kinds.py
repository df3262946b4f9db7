"""Which architectures can be trained, and what differs between them: plain facts, no weights.

    kind       tensors begin with   head of a classification            its input
    decoder    model.               score                               the last token that is no pad token
    BERT       bert.                bert.pooler.dense, classifier       the first token, [CLS]
    RoBERTa    roberta.             classifier.dense, .out_proj         the first token, <s>

The head is what transformers' own classifiers have behind the blocks; all of it trains as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_ds.config.errors import UserError


@dataclass(frozen=True)
class ModelKind:
    """One architecture."""

    prefix: str = "model"
    """What the names of the base model's tensors begin with, in a model that has a head."""
    is_encoder: bool = False
    """Every token sees every other one. No language model: it only classifies."""
    head: tuple[str, ...] = ("score",)
    """The linear layers of a classification's head, in the order of the forward pass."""
    pretrained_head: tuple[str, ...] = ()
    """Those of `head` that a checkpoint of the base model may bring along."""
    other_heads: tuple[str, ...] = (r"^lm_head\.weight$",)
    """Regular expressions: tensors of checkpoints that a classifier has no use for."""


_DECODER = ModelKind()
KINDS: Mapping[str, ModelKind] = {
    "llama": _DECODER,
    "mistral": _DECODER,
    "gemma2": _DECODER,
    "bert": ModelKind(
        prefix="bert",
        is_encoder=True,
        head=("bert.pooler.dense", "classifier"),
        pretrained_head=("bert.pooler.dense",),
        other_heads=(r"^cls\.", r"\.position_ids$"),
    ),
    "roberta": ModelKind(
        prefix="roberta",
        is_encoder=True,
        head=("classifier.dense", "classifier.out_proj"),
        other_heads=(r"^lm_head\.", r"^roberta\.pooler\.", r"\.position_ids$"),
    ),
}
"""`model_type` of config.json -> what it is."""


def input_facts(config: Any) -> dict[str, Any]:
    """What the data must know of a transformers configuration: the fields of `data.labeled_texts.ClassifierInputs`."""
    kind = KINDS[config.model_type]
    if not kind.is_encoder:
        return {"is_encoder": False, "has_token_types": False, "max_tokens": None}
    # RoBERTa's positions begin behind the id of its pad token.
    first_position = config.pad_token_id + 1 if config.model_type == "roberta" else 0
    return {
        "is_encoder": True,
        "has_token_types": config.type_vocab_size > 1,
        "max_tokens": config.max_position_embeddings - first_position,
    }


def check_model_type(config: Mapping[str, Any], folder: Path) -> None:
    """Raises UserError: the architecture that config.json names is not supported."""
    model_type = config.get("model_type")
    if model_type in KINDS:
        return
    # `auto_map` names Python files of the repository.
    remote = " that needs code of its repository, and remote code is never executed" if "auto_map" in config else ""
    raise UserError(
        f"model.name_or_path: {folder} is a {model_type!r} model{remote}; expected one of {', '.join(KINDS)}."
    )


def check_task(config: Mapping[str, Any], folder: Path, task: str) -> None:
    """Raises UserError: the architecture is not supported, or cannot do `task` (as `model.task`)."""
    check_model_type(config, folder)
    if task == "causal_lm" and KINDS[config["model_type"]].is_encoder:
        raise UserError(
            f"model.task: got causal_lm, but {folder} is a {config['model_type']!r} model, an encoder, which cannot "
            "predict the next token. Set model.task to sequence_classification, or choose another base."
        )
