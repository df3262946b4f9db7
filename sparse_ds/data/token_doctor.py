"""Plain words about what commonly ruins a fine-tuning: BOS, EOS, padding, masks, cuts, duplicates, leaks, labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from sparse_ds.data.preview import SourceFacts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Level = Literal["fine", "note", "warning"]

MANY_TRUNCATED = 0.05
MANY_DUPLICATES = 0.01
FEW_TRAINED_TOKENS = 0.02
MANY_UNKNOWN = 0.001
MUCH_PADDING = 0.3
ONE_SIDED_LABELS = 0.9
"""Shares above (or below) which a fact is worth a warning. They are judgement, not measurement."""


class Finding(NamedTuple):
    """One sentence or two; a `warning` is worth a change before the run."""

    level: Level
    text: str


@dataclass(frozen=True)
class RunFacts:
    """What of the run and the model the data has to fit.

    Attributes:
        sequence_length: `data.sequence_length`.
        max_positions: tokens that the model takes; None: not known.
        vocabulary_size: rows of the model's embedding; None: not known.
        global_batch_size: samples of one step, as far as it does not depend on the number of ranks.
        micro_batch_size: samples of one forward pass.
        packing: `data.packing`, which leaves nearly no padding; None: the task has no such choice.
    """

    sequence_length: int
    max_positions: int | None
    vocabulary_size: int | None
    global_batch_size: int
    micro_batch_size: int
    packing: bool | None = None


def examine(
    train: SourceFacts, heldout: SourceFacts | None, tokenizer: PreTrainedTokenizerBase, run: RunFacts
) -> list[Finding]:
    """All findings, warnings first."""
    found = []
    for facts in (train, heldout):
        if facts is not None:
            found += [Finding(one.level, f"{facts.name}: {one.text}") for one in _of_source(facts, tokenizer, run)]
    found += [*_padding(train, tokenizer, run), *_size(train, run), *_model(train, run)]
    if heldout is not None:
        found += _leaks(train, heldout)
    order: tuple[Level, ...] = ("warning", "note", "fine")
    return sorted(found, key=lambda one: order.index(one.level))


def _of_source(facts: SourceFacts, tokenizer: PreTrainedTokenizerBase, run: RunFacts) -> Iterator[Finding]:
    yield from _beginning(facts, tokenizer)
    if facts.labels is None:
        yield from _end(facts, tokenizer)
        yield from _mask(facts)
    else:
        yield from _labels(facts)
    num_truncated = facts.num_cut if facts.num_truncated is None else facts.num_truncated
    if num_truncated:
        share = num_truncated / facts.num_samples
        yield Finding(
            "warning" if share > MANY_TRUNCATED else "note",
            f"{_of(num_truncated, facts)} are longer than data.sequence_length ({run.sequence_length} tokens) and lose "
            + ("a part." if facts.labels else "their end. What was cut is not learned, nor is where to stop."),
        )
    if facts.num_dropped:
        yield Finding(
            "warning",
            f"{facts.num_dropped:,} samples are left out, because nothing to learn is left of them within "
            f"data.sequence_length ({run.sequence_length} tokens).",
        )
    if facts.num_duplicates:
        share = facts.num_duplicates / facts.num_samples
        yield Finding(
            "warning" if share > MANY_DUPLICATES else "note",
            f"{_of(facts.num_duplicates, facts)} are equal to an earlier one, token by token; they count twice.",
        )
    if facts.num_unknown_tokens:
        share = facts.num_unknown_tokens / facts.num_tokens
        yield Finding(
            "warning" if share > MANY_UNKNOWN else "note",
            f"{facts.num_unknown_tokens:,} tokens ({share:.2%}) are {tokenizer.unk_token!r}: the tokenizer does not "
            "know the characters, and the model cannot tell them apart.",
        )


def _beginning(facts: SourceFacts, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    bos = tokenizer.bos_token
    if bos is None:
        yield Finding("fine", "the tokenizer has no BOS token, and none is needed.")
        return
    adds_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    if facts.num_bos_twice:
        yield Finding(
            "warning",
            f"{_of(facts.num_bos_twice, facts)} start with {bos!r} twice: the data or the template writes it, and so "
            "does the tokenizer. Take it out of one.",
        )
    if facts.num_bos_first == facts.num_samples:
        yield Finding("fine", f"every sample starts with the BOS token {bos!r}.")
    elif facts.num_bos_first == 0 and not adds_bos:
        yield Finding("fine", "no sample starts with a BOS token; this tokenizer does not put one in front either.")
    elif facts.format_name == "text" and facts.num_bos_first:
        yield Finding("fine", f"{_of(facts.num_bos_first, facts)} start with {bos!r}: the beginnings of texts.")
    elif adds_bos:
        missing = facts.num_samples - facts.num_bos_first
        yield Finding(
            "warning",
            f"{_of(missing, facts)} do not start with {bos!r}, which the tokenizer puts in front of every text. A "
            "model that knows it from its training answers worse without: add it to the chat template.",
        )
    else:
        yield Finding("note", f"{_of(facts.num_bos_first, facts)} start with the BOS token {bos!r}, the others do not.")


def _end(facts: SourceFacts, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    eos, num_whole = tokenizer.eos_token, facts.num_samples - facts.num_cut
    open_ends = num_whole - facts.num_end_trained - facts.num_end_masked
    if num_whole and facts.num_end_trained == num_whole:
        yield Finding(
            "fine", f"every sample that is not cut ends with a special token that is trained (EOS is {eos!r})."
        )
    elif facts.num_end_trained == 0 and facts.num_end_masked == 0 and facts.format_name == "text":
        yield Finding(
            "note",
            "running text is cut into blocks without an end: the model goes on writing and learns nowhere to stop.",
        )
    else:
        if facts.num_end_masked:
            yield Finding(
                "warning",
                f"{_of(facts.num_end_masked, facts)} end with a special token that is not trained: the model sees "
                "where to stop, but does not learn it, and will not stop.",
            )
        if open_ends > 0:
            yield Finding(
                "warning" if open_ends > num_whole // 2 else "note",
                f"{_of(open_ends, facts)} end without a special token, though they are not cut: the model does not "
                "learn to stop there.",
            )
    if facts.num_eos_inside:
        yield Finding(
            "note",
            f"{_of(facts.num_eos_inside, facts)} have a trained {eos!r} before their end. Right for conversations of "
            "several turns; else the data writes it into the text.",
        )


def _mask(facts: SourceFacts) -> Iterator[Finding]:
    share = facts.trained_fraction
    if share < FEW_TRAINED_TOKENS:
        yield Finding(
            "warning",
            f"only {share:.1%} of the tokens are trained; most of the work goes into reading prompts. Shorten them, if "
            "they need not be so long.",
        )
    elif facts.format_name != "text" and facts.num_tokens - facts.num_trained_tokens <= facts.num_samples:
        yield Finding("warning", "every token is trained, the prompts too: are they empty?")
    else:
        yield Finding("fine", f"{share:.1%} of the tokens are trained.")


def _labels(facts: SourceFacts) -> Iterator[Finding]:
    assert facts.labels is not None
    missing = [label for number, label in enumerate(facts.labels) if not facts.label_counts[number]]
    if missing:
        yield Finding("warning", f"no sample has the label {', '.join(map(repr, missing[:10]))}.")
    number, count = facts.label_counts.most_common(1)[0]
    share = count / facts.num_samples
    level: Level = "warning" if share > ONE_SIDED_LABELS else "fine"
    yield Finding(
        level,
        f"the most frequent label is {facts.labels[number]!r} with {share:.1%}: who always says it is right so often.",
    )


def _padding(train: SourceFacts, tokenizer: PreTrainedTokenizerBase, run: RunFacts) -> Iterator[Finding]:
    pad, eos = tokenizer.pad_token, tokenizer.eos_token
    if pad is None or pad == eos:
        why = "the tokenizer has no pad token, so" if pad is None else "the pad token is the EOS token:"
        learned = f", so the {eos!r} at a sample's end is still learned and the filling never is"
        yield Finding("fine", f"{why} {eos!r} fills short rows. Masks go by length{'' if train.labels else learned}.")
    elif train.num_pad_inside:
        yield Finding(
            "warning",
            f"{train.name}: {_of(train.num_pad_inside, train)} hold the pad token {pad!r} as if it were text. Masks go "
            "by length, so it is read there; but take it out of the data.",
        )
    else:
        yield Finding("fine", f"padding has a token of its own, {pad!r}, which no sample holds.")
    if run.micro_batch_size > 1 and not run.packing and train.num_samples >= run.micro_batch_size:
        share = padding_fraction(train.lengths, run.micro_batch_size)
        if share > MUCH_PADDING:
            yield Finding(
                "note",
                f"{train.name}: micro batches of {run.micro_batch_size} random samples are {share:.0%} padding, "
                "because lengths differ so much." + ("" if run.packing is None else " data.packing true avoids it."),
            )


def _size(train: SourceFacts, run: RunFacts) -> Iterator[Finding]:
    if not train.is_part and train.num_samples < run.global_batch_size:
        yield Finding(
            "warning",
            f"{train.name}: {train.num_samples:,} samples are fewer than one step takes ({run.global_batch_size:,}).",
        )


def _model(train: SourceFacts, run: RunFacts) -> Iterator[Finding]:
    if run.max_positions is not None and int(train.lengths.max()) > run.max_positions:
        yield Finding(
            "warning",
            f"{train.name}: the longest sample has {int(train.lengths.max()):,} tokens, the model knows "
            f"{run.max_positions:,} positions. Lower data.sequence_length.",
        )
    if run.vocabulary_size is not None and train.largest_id >= run.vocabulary_size:
        yield Finding(
            "warning",
            f"{train.name}: the tokenizer gives the id {train.largest_id}, the model's vocabulary ends at "
            f"{run.vocabulary_size - 1}: tokenizer and model do not belong together.",
        )


def _leaks(train: SourceFacts, heldout: SourceFacts) -> Iterator[Finding]:
    shared = len(train.digests & heldout.digests)
    if shared:
        yield Finding(
            "warning",
            f"{shared:,} of {len(heldout.digests):,} different held-out samples are in the training data too: the "
            "held-out loss will look better than it is.",
        )
    else:
        yield Finding("fine", "no held-out sample is in the training data.")


def padding_fraction(lengths: np.typing.NDArray[np.int64], micro_batch_size: int) -> float:
    """Share of padding in micro batches of samples in random order (one draw), each as long as its longest sample."""
    shuffled = np.random.default_rng(0).permutation(lengths)
    whole = shuffled[: len(shuffled) // micro_batch_size * micro_batch_size].reshape(-1, micro_batch_size)
    return float(1 - whole.sum() / (whole.max(axis=1).sum() * micro_batch_size))


def _of(count: int, facts: SourceFacts) -> str:
    return f"{count:,} of {facts.num_samples:,} samples ({count / facts.num_samples:.1%})"
