"""The preview as one HTML file: no script, no network, light and dark, every token with its number on hovering."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from sparse_ds.config.errors import UserError
from sparse_ds.data.preview import SampleView, SourceFacts, TokenView, bin_lengths
from sparse_ds.data.preview_text import summary_rows
from sparse_ds.data.token_doctor import Finding

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2024; --soft: #60646c; --line: #d9d9e0; --bar: #5b8def;
  --trained: #d3f2df; --trained-ink: #0b4f2a; --trained-line: #2b9a66; --masked-ink: #60646c; --special: #ffe8bb;
  --warning: #ffdbdc; --note: #e6f0ff; --fine: #e6f6eb; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181c; --ink: #edeef0; --soft: #b0b4ba; --line: #3a3f47;
  --bar: #6f9df5; --trained: #113b29; --trained-ink: #b9f2d0; --trained-line: #3dd68c; --masked-ink: #9ba1a9;
  --special: #4d3500; --warning: #52202a; --note: #12294d; --fine: #132d21; } }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1.25rem 0 .4rem; } p { margin: .25rem 0; } .soft { color: var(--soft); }
table { border-collapse: collapse; } th, td { text-align: left; padding: .15rem 1rem .15rem 0; vertical-align: top; }
th { font-weight: 500; color: var(--soft); white-space: nowrap; }
.bars { width: 100%; max-width: 40rem; } .bars th, .bars td { padding: .1rem .6rem .1rem 0; line-height: 1.2; }
.bars th, .count { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.bars .room { width: 100%; } .bar { display: block; height: .9rem; background: var(--bar); border-radius: 2px; }
ul { list-style: none; padding: 0; margin: 0; } li { padding: .4rem .7rem; margin: .3rem 0; border-radius: 4px; }
li { display: grid; grid-template-columns: 5.5rem 1fr; } .warning { background: var(--warning); }
.note { background: var(--note); } .fine { background: var(--fine); }
.sample { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); border-radius: 4px;
  padding: .75rem; font: 14px/1.7 ui-monospace, monospace; color: var(--masked-ink); }
.t { background: var(--trained); color: var(--trained-ink); border-bottom: 2px solid var(--trained-line); }
.s { background: var(--special); border-radius: 3px; outline: 1px solid var(--line); } .sample .t.s { color: inherit; }
.sample span { box-shadow: inset 1px 0 var(--line); } .sample span:hover { outline: 2px solid var(--bar); }
.end { color: var(--soft); opacity: .6; }
.legend span { padding: 0 .3rem; font-family: ui-monospace, monospace; }
"""
_LEVELS = {"warning": "Warning", "note": "Note", "fine": "Fine"}


def preview_html(title: str, sources: Sequence[SourceFacts], findings: Sequence[Finding]) -> str:
    """The whole document.

    Args:
        title: what was previewed.
        sources: the training and the held-out data.
        findings: what the doctor says.
    """
    num_warnings = sum(finding.level == "warning" for finding in findings)
    said = "no warning" if num_warnings == 0 else "1 warning" if num_warnings == 1 else f"{num_warnings} warnings"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">What training takes, after templates, cutting and masking. The doctor has {said}.</p>',
        "<h2>Doctor</h2>",
        f"<ul>{''.join(map(_finding, findings))}</ul>",
        *(_source(facts) for facts in sources),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{_STYLE}</style></head>\n'
        "<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def save_html(document: str, path: Path) -> None:
    """Write the document.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html: {path} cannot be written ({error.strerror}). Give another path.") from None


def _finding(finding: Finding) -> str:
    return f'<li class="{finding.level}"><b>{_LEVELS[finding.level]}</b><span>{escape(finding.text)}</span></li>'


def _source(facts: SourceFacts) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in summary_rows(facts))
    samples = "\n".join(_sample(sample) for sample in facts.samples)
    return (
        f"<h2>{escape(facts.name)}: {escape(facts.source)}</h2>\n<table>{rows}</table>\n"
        f"<h3>Tokens a sample</h3>\n{_histogram(facts)}\n<h3>Samples</h3>\n{_legend(facts)}\n{samples}"
    )


def _histogram(facts: SourceFacts) -> str:
    bins = bin_lengths(facts.lengths)
    largest = max(count for _, _, count in bins)
    rows = []
    for first, last, count in bins:
        width = 100 * count / largest
        rows.append(
            f'<tr><th>{first:,}-{last:,}</th><td class="room"><span class="bar" style="width:{width:.2f}%"></span></td>'
            f'<td class="count">{count:,}</td></tr>'
        )
    return f'<table class="bars">{"".join(rows)}</table>'


def _legend(facts: SourceFacts) -> str:
    special = '<span class="s">special</span> BOS, EOS and the like.'
    if facts.labels is not None:
        return f'<p class="legend soft">The text is read, the label is learned. {special}</p>'
    return (
        f'<p class="legend soft"><span class="t">trained</span> the loss counts it. <span>masked</span> read only. '
        f"{special} The number of a token shows when the pointer is on it.</p>"
    )


def _sample(sample: SampleView) -> str:
    label = "" if sample.label is None else f", label <b>{escape(sample.label)}</b>"
    tokens = "".join(_token(position, token) for position, token in enumerate(sample.tokens))
    return (
        f"<h3>Sample {sample.number} <span class='soft'>({len(sample.tokens):,} tokens{label})</span></h3>\n"
        f'<div class="sample">{tokens}</div>'
    )


def _token(position: int, token: TokenView) -> str:
    classes = " ".join(name for name, holds in (("t", token.is_trained), ("s", token.is_special)) if holds)
    # A token without text is a part of a character that the next one ends.
    text = escape(token.text).replace("\n", '<i class="end">\u21b5</i>\n') or '<i class="end">\u00b7</i>'
    attribute = f' class="{classes}"' if classes else ""
    return f'<span{attribute} title="token {position}: id {token.token_id}">{text}</span>'
