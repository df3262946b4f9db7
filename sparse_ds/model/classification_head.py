"""The head of a classification: all that transformers' classifiers have behind the blocks (`model.kinds`).

It trains as a whole, while the rest of the model trains at single weights (SpaRTA, Rios et al. 2025, arXiv 2502.15975).
Over sparse layers it is fp32 like their values, since all trained tensors of one engine must have one dtype; its input
is converted. Its numbers before training:

    decoders, normal        weight ~ N(0, s^2), s = 0.06 / sqrt(d), d the hidden size
    decoders, label_words   row i = row of the first token of label word i in the vocabulary's matrix (in the input
                            embedding where the checkpoint has no matrix of its own): the head starts as the language
                            model's own opinion
    encoders                weights ~ N(0, initializer_range^2) of config.json, biases 0, as transformers does; the
                            pooler of BERT as the checkpoint has it

The normal numbers are made by Box-Muller in fp64 from the raw words of Philox4x64-10, whose stream NumPy guarantees
(see `selection.random_subset`), and rounded to fp32. Only the last digit of logarithm and cosine is up to the machine,
and the rounding hides it in all but about one of 10^8 numbers. A number lies in the slice of one rank only, so ranks
cannot differ.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
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
from sparse_ds.model.kinds import KINDS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

HEAD_NAME = "score"
"""Of decoders; its weight is `score.weight`. Those of encoders are in `model.kinds`."""
NORMAL_SCALE = 0.06
"""Times 1 / sqrt(hidden size): the standard deviation of the normal initialization of a decoder's head."""


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


class HeadLinear(nn.Module):
    """[..., I] in any dtype -> [..., O] in the dtype of the weight [O, I]; the bias [O] may be absent."""

    weight: Parameter
    bias: Parameter | None

    def __init__(self, weight: Parameter, bias: Parameter | None) -> None:
        super().__init__()
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.linear(hidden_states.to(self.weight.dtype), self.weight, self.bias)


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


def initial_head(
    checkpoint: BaseCheckpoint, classification: Classification, model: PreTrainedModel, seed: int
) -> dict[str, Tensor]:
    """The head before training: name of a parameter -> fp32 numbers, the same on every rank.

    Args:
        checkpoint: the base model.
        classification: labels and label words.
        model: from `model.build.empty_model`, a classifier.
        seed: of the run.

    Raises:
        UserError: the vocabulary's matrix does not fit to the tokenizer; a pooler of another shape; label words for an
            encoder.
    """
    kind = KINDS[model.config.model_type]
    shapes = {name: tuple(model.get_parameter(f"{name}.weight").shape) for name in kind.head}
    ids = classification.label_word_ids
    if not kind.is_encoder:
        (name,) = kind.head
        if ids is not None:
            return {f"{name}.weight": _rows_of_words(checkpoint, ids, model.config.hidden_size)}
        scale = NORMAL_SCALE / math.sqrt(model.config.hidden_size)
        return {f"{name}.weight": normal_numbers(shapes[name], scale, seed, f"{name}.weight")}
    if ids is not None:
        raise UserError(
            f"model.head_initialization: got label_words with a {model.config.model_type} model, whose head does not "
            "read the vocabulary's space. Set it to normal."
        )
    made: dict[str, Tensor] = {}
    for name in kind.head:
        made |= _pretrained(checkpoint, name, shapes[name]) if name in kind.pretrained_head else {}
        if f"{name}.weight" not in made:
            weight = f"{name}.weight"
            made[weight] = normal_numbers(shapes[name], model.config.initializer_range, seed, weight)
            made[f"{name}.bias"] = torch.zeros(shapes[name][0])
    return made


def normal_numbers(shape: tuple[int, ...], scale: float, seed: int, name: str) -> Tensor:
    """fp32 numbers ~ N(0, scale^2) that depend on `seed` and `name` only."""
    return (scale * _standard_normal(math.prod(shape), seed=seed, name=name)).to(torch.float32).view(shape)


def install_head(
    model: PreTrainedModel, head: Mapping[str, Tensor], dtype: torch.dtype, partitioned: PartitionedParameters
) -> None:
    """Put a trainable head into a classification model whose own head has no storage yet.

    Args:
        model: from `model.build.empty_model`, changed in place.
        head: from `initial_head`.
        dtype: of the head.
        partitioned: makes parameters.

    Collectives: none; every rank must call it (DeepSpeed numbers the parameters).
    """

    def make(tensor: Tensor) -> Parameter:
        tensor = tensor.to(dtype)
        return partitioned.make(tuple(tensor.shape), dtype, slice_of(tensor), requires_grad=True)

    for name in KINDS[model.config.model_type].head:
        bias = head.get(f"{name}.bias")
        linear = HeadLinear(make(head[f"{name}.weight"]), None if bias is None else make(bias))
        model.set_submodule(name, linear)


def _rows_of_words(checkpoint: BaseCheckpoint, ids: Sequence[int], hidden_size: int) -> Tensor:
    """[L, D] fp32 rows of the vocabulary's matrix."""
    name = "lm_head.weight" if "lm_head.weight" in checkpoint else "model.embed_tokens.weight"
    shape = checkpoint.stored(name).shape
    if len(shape) != 2 or shape[1] != hidden_size or max(ids) >= shape[0]:
        raise UserError(
            f"model.name_or_path: tensor {name!r} has shape {shape}, expected rows of {hidden_size} for every token up "
            f"to {max(ids)}; the tokenizer belongs to another model."
        )
    rows = [checkpoint.read_range(name, i * hidden_size, (i + 1) * hidden_size) for i in ids]
    return torch.stack(rows).to(torch.float32)


def _pretrained(checkpoint: BaseCheckpoint, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """A part of the head that the checkpoint brings along, or nothing."""
    parts = {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    if not all(part in checkpoint for part in parts):
        logger.warning("%s has no %s: it starts with random numbers", checkpoint.folder, name)
        return {}
    made = {}
    for part, expected in parts.items():
        stored = checkpoint.stored(part)
        if stored.shape != expected or not stored.dtype.is_floating_point:
            raise UserError(
                f"model.name_or_path: tensor {part!r} of {checkpoint.folder} has shape {stored.shape} and dtype "
                f"{stored.dtype}, expected {expected} from config.json and a floating dtype."
            )
        made[part] = checkpoint.read(part).to(torch.float32)
        if not bool(made[part].isfinite().all()):
            raise UserError(
                f"model.name_or_path: tensor {part!r} of {checkpoint.folder} holds NaN or Inf; the checkpoint is "
                "damaged. Get it again."
            )
    return made


def _standard_normal(count: int, *, seed: int, name: str) -> Tensor:
    """[count] fp64 numbers ~ N(0, 1) that depend on `seed` and `name` only."""
    key = hashlib.sha256(f"sparse_ds standard_normal\0{seed}\0{name}".encode()).digest()[:16]
    words = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(2 * count).reshape(2, count)
    # The upper 53 bits, as fractions: the first in (0, 1], whose logarithm is finite.
    fractions = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    radius, angle = np.sqrt(-2.0 * np.log(1.0 - fractions[0])), 2.0 * np.pi * fractions[1]
    return torch.from_numpy(radius * np.cos(angle))
