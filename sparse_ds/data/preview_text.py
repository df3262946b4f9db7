"""The preview for a terminal: with colours, or plain with brackets around what is trained."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import groupby

import numpy as np

from sparse_ds.data.preview import SampleView, SourceFacts, TokenView, bin_lengths
from sparse_ds.data.token_doctor import Finding

WIDTH = 100
BAR_WIDTH = 40
MAX_SHOWN_TOKENS = 400
"""Of a longer sample the middle is left out in the terminal; the HTML file shows all of it."""
TRAINED_BRACKETS = "⟦", "⟧"
_COLOURS = {"trained": "\x1b[32m", "masked": "\x1b[2m", "special": "\x1b[7m"}
_RESET = "\x1b[0m"
_MARKS = {"fine": "ok", "note": "note", "warning": "WARNING"}


def preview_text(sources: Sequence[SourceFacts], findings: Sequence[Finding], *, colour: bool) -> str:
    """The whole preview, at most 100 columns wide but for the samples' own lines."""
    parts = []
    for facts in sources:
        parts += [_heading(f"{facts.name}: {facts.source}"), *_numbers(facts), "", *_histogram(facts), ""]
    parts += [_heading("doctor"), *(line for finding in findings for line in _finding(finding)), ""]
    for facts in sources:
        for sample in facts.samples:
            label = "" if sample.label is None else f", label {sample.label}"
            parts += [_heading(f"{facts.name}, sample {sample.number} ({len(sample.tokens)} tokens{label})")]
            parts += [_sample(sample, colour), ""]
    return "\n".join([*parts, _legend(sources, colour)])


def summary_rows(facts: SourceFacts) -> list[tuple[str, str]]:
    """(what, how much) of one source; for HTML too."""
    lengths = facts.lengths
    part = " (the first of a stream)" if facts.is_part else ""
    rows = [
        ("format", facts.format_name),
        ("samples", f"{facts.num_samples:,}{part}"),
        ("tokens", f"{facts.num_tokens:,}"),
    ]
    if facts.labels is None:
        rows.append(("trained tokens", f"{facts.num_trained_tokens:,} ({facts.trained_fraction:.1%})"))
    else:
        shares = (f"{label} {facts.label_counts[n] / facts.num_samples:.1%}" for n, label in enumerate(facts.labels))
        rows.append(("labels", ", ".join(shares)))
    rows.append(
        (
            "length",
            f"{lengths.min():,} to {lengths.max():,}, mean {lengths.mean():,.0f}, median {np.median(lengths):,.0f}, "
            f"95 % up to {np.percentile(lengths, 95):,.0f}",
        )
    )
    num_truncated = facts.num_cut if facts.num_truncated is None else facts.num_truncated
    rows.append(("truncated", f"{num_truncated:,} ({num_truncated / facts.num_samples:.1%})"))
    if facts.num_dropped:
        rows.append(("left out", f"{facts.num_dropped:,}"))
    rows.append(("duplicates", f"{facts.num_duplicates:,} ({facts.num_duplicates / facts.num_samples:.1%})"))
    return rows


def _heading(text: str) -> str:
    return f"-- {text} {'-' * max(0, WIDTH - len(text) - 4)}"


def _numbers(facts: SourceFacts) -> list[str]:
    rows = summary_rows(facts)
    width = max(len(name) for name, _ in rows)
    return [
        line
        for name, text in rows
        for line in textwrap.wrap(
            f"{name:<{width}}  {text}", WIDTH, subsequent_indent=" " * (width + 2), break_on_hyphens=False
        )
    ]


def _histogram(facts: SourceFacts) -> list[str]:
    bins = bin_lengths(facts.lengths)
    largest = max(count for _, _, count in bins)
    names = [f"{first:,}-{last:,}" for first, last, _ in bins]
    width = max(len(name) for name in names)
    lines = ["tokens a sample"]
    for name, (_, _, count) in zip(names, bins, strict=True):
        bar = "#" * -(-count * BAR_WIDTH // largest)
        lines.append(f"{name:>{width}}  {bar:<{BAR_WIDTH}}  {count:,}")
    return lines


def _finding(finding: Finding) -> list[str]:
    mark = _MARKS[finding.level]
    return textwrap.wrap(
        f"{mark:<8}{finding.text}", WIDTH, subsequent_indent=" " * 8, break_on_hyphens=False, break_long_words=False
    )


def _sample(sample: SampleView, colour: bool) -> str:
    tokens = sample.tokens
    if len(tokens) <= MAX_SHOWN_TOKENS:
        return _tokens(tokens, colour)
    half = MAX_SHOWN_TOKENS // 2
    left_out = f" ... {len(tokens) - 2 * half:,} tokens ... "
    return _tokens(tokens[:half], colour) + left_out + _tokens(tokens[-half:], colour)


def _tokens(tokens: Sequence[TokenView], colour: bool) -> str:
    shown = []
    for is_trained, group in groupby(tokens, key=lambda token: token.is_trained):
        if colour:
            shown.append("".join(_coloured(token) for token in group))
        else:
            text = "".join(token.text for token in group)
            shown.append(f"{TRAINED_BRACKETS[0]}{text}{TRAINED_BRACKETS[1]}" if is_trained else text)
    return "".join(shown)


def _coloured(token: TokenView) -> str:
    kind = "trained" if token.is_trained else "masked"
    return f"{_COLOURS[kind]}{_COLOURS['special'] if token.is_special else ''}{token.text}{_RESET}"


def _legend(sources: Sequence[SourceFacts], colour: bool) -> str:
    if all(facts.labels is not None for facts in sources):
        return "A classification: the text is read, the label is learned."
    if not colour:
        return f"{TRAINED_BRACKETS[0]}trained{TRAINED_BRACKETS[1]}: the loss counts it; the rest is read only."
    shown = (
        f"{_COLOURS['trained']}trained{_RESET}: the loss counts it",
        f"{_COLOURS['masked']}masked{_RESET}: read only",
        f"{_COLOURS['special']}special{_RESET}: BOS, EOS and the like",
    )
    return "; ".join(shown)
