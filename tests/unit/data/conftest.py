"""A tokenizer whose ids a reader can compute: one token a UTF-8 byte, `5 + byte`, and one merge, `ab` = 261."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>", "<|turn|>", "<|end|>"]  # ids 0 to 4


def byte_symbols() -> list[str]:
    """The character that byte-level BPE writes for each byte 0..255 (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in symbols]
    symbols |= {byte: chr(256 + position) for position, byte in enumerate(others)}
    return [symbols[byte] for byte in range(256)]


def byte_tokenizer(*, template: str | None = "<s> $A", **settings: object) -> PreTrainedTokenizerFast:
    """The tokenizer above; `template` says which special tokens it puts around a text."""
    vocabulary = {token: number for number, token in enumerate(SPECIAL)}
    vocabulary |= {symbol: 5 + byte for byte, symbol in enumerate(byte_symbols())}
    vocabulary["ab"] = 261
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if template is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|turn|>", "<|end|>"],
        model_max_length=32,
        **settings,
    )


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """make_tokenizer(template=..., chat_template=..., pad_token=...) -> the byte tokenizer."""
    return byte_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """write_jsonl(row, row, ..., name="rows.jsonl") -> the file's path."""

    def write(*rows: object, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
