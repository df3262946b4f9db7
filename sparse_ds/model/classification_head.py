"""The head of a classification: one row of weights per label, applied to the hidden state of the last token.

It takes the place of the vocabulary's matrix and trains as a whole, while the rest of the model trains at single
weights (SpaRTA, Rios et al. 2025, arXiv 2502.15975). Over sparse layers it is fp32 like their values, since all trained
tensors of one engine must have one dtype; its input is converted.

    normal        weight ~ N(0, s^2), s = 0.06 / sqrt(d), d the hidden size
    label_words   row i = row of the first token of label word i in the vocabulary's matrix (in the input embedding
                  where the checkpoint has no matrix of its own): the head starts as the language model's own opinion

The normal numbers are made by Box-Muller in fp64 from the raw words of Philox4x64-10, whose stream NumPy guarantees
(see `selection.random_subset`), and rounded to fp32. Only the last digit of logarithm and cosine is up to the machine,
and the rounding hides it in all but about one of 10^8 numbers. A number lies in the slice of one rank only, so ranks
cannot differ.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from sparse_ds.config.errors import UserError
from sparse_ds.distributed.born_partitioned import PartitionedParameters, slice_of
from sparse_ds.model.base_checkpoint import BaseCheckpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HEAD_NAME = "score"
"""transformers' name of the head; its weight is `score.weight`."""
NORMAL_SCALE = 0.06
"""Times 1 / sqrt(hidden size): the standard deviation of the normal initialization."""


@dataclass(frozen=True)
class Classification:
    """What a classification model needs to know of its data.

    Args:
        labels: in the order of the head's rows.
        pad_token_id: what the collator pads with.
        label_word_ids: first token of each label's word; None: the head starts with normal numbers.
    """

    labels: tuple[str, ...]
    pad_token_id: int
    label_word_ids: tuple[int, ...] | None = None


class ClassificationHead(nn.Module):
    """[..., D] in any dtype -> logits [..., L] in the dtype of the weight [L, D]."""

    def __init__(self, weight: Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.linear(hidden_states.to(self.weight.dtype), self.weight)


def find_label_word_ids(
    tokenizer: PreTrainedTokenizerBase, label_words: Sequence[str], labels: Sequence[str]
) -> tuple[int, ...]:
    """The first token of each label word.

    Raises:
        UserError: not one word per label, a word without a token, or two words with the same first token.
    """
    if len(label_words) != len(labels):
        raise UserError(
            f"model.label_words: got {len(label_words)} words for {len(labels)} labels ({', '.join(labels[:20])}). "
            "Give one word per label, in this order."
        )
    word_of_id: dict[int, str] = {}
    for word in label_words:
        ids: list[int] = tokenizer(word, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UserError(f"model.label_words: the tokenizer makes no token of {word!r}. Choose another word.")
        if ids[0] in word_of_id:
            raise UserError(
                f"model.label_words: {word_of_id[ids[0]]!r} and {word!r} begin with the same token "
                f"({tokenizer.convert_ids_to_tokens(ids[0])!r}), so their rows would be the same. Choose another word."
            )
        word_of_id[ids[0]] = word
    return tuple(word_of_id)


def initial_head(checkpoint: BaseCheckpoint, classification: Classification, hidden_size: int, seed: int) -> Tensor:
    """The head before training: [L, D] fp32, the same on every rank.

    Raises:
        UserError: the vocabulary's matrix does not fit to the tokenizer.
    """
    num_labels = len(classification.labels)
    if classification.label_word_ids is None:
        scale = NORMAL_SCALE / math.sqrt(hidden_size)
        numbers = _standard_normal(num_labels * hidden_size, seed=seed, name=f"{HEAD_NAME}.weight")
        return (scale * numbers).to(torch.float32).view(num_labels, hidden_size)
    name = "lm_head.weight" if "lm_head.weight" in checkpoint else "model.embed_tokens.weight"
    shape, ids = checkpoint.stored(name).shape, classification.label_word_ids
    if len(shape) != 2 or shape[1] != hidden_size or max(ids) >= shape[0]:
        raise UserError(
            f"model.name_or_path: tensor {name!r} has shape {shape}, expected rows of {hidden_size} for every token up "
            f"to {max(ids)}; the tokenizer belongs to another model."
        )
    rows = [checkpoint.read_range(name, i * hidden_size, (i + 1) * hidden_size) for i in ids]
    return torch.stack(rows).to(torch.float32)


def install_head(
    model: PreTrainedModel, weight_LD: Tensor, dtype: torch.dtype, partitioned: PartitionedParameters
) -> None:
    """Put a trainable head into a classification model whose own head has no storage yet.

    Collectives: none; every rank must call it (DeepSpeed numbers the parameters).
    """
    weight_LD = weight_LD.to(dtype)
    parameter = partitioned.make(tuple(weight_LD.shape), dtype, slice_of(weight_LD), requires_grad=True)
    setattr(model, HEAD_NAME, ClassificationHead(parameter))


def _standard_normal(count: int, *, seed: int, name: str) -> Tensor:
    """[count] fp64 numbers ~ N(0, 1) that depend on `seed` and `name` only."""
    key = hashlib.sha256(f"sparse_ds standard_normal\0{seed}\0{name}".encode()).digest()[:16]
    words = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(2 * count).reshape(2, count)
    # The upper 53 bits, as fractions: the first in (0, 1], whose logarithm is finite.
    fractions = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    radius, angle = np.sqrt(-2.0 * np.log(1.0 - fractions[0])), 2.0 * np.pi * fractions[1]
    return torch.from_numpy(radius * np.cos(angle))
