"""The tokenizer of a base model."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sparse_ds.config.errors import UserError


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer whose files lie beside the weights.

    Raises:
        UserError: there is none, or transformers cannot read it.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers, tokenizers and sentencepiece raise kinds of their own
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            reason = "it needs code of its repository, and remote code is never executed"
        raise UserError(
            f"model.name_or_path: {folder} has no tokenizer that can be loaded ({type(error).__name__}: {reason}). "
            "Expected tokenizer.json or tokenizer.model, and tokenizer_config.json, beside the weights: get them again."
        ) from error
    return tokenizer
