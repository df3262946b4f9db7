"""A tiny random base model of sizes that do not divide, and its data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HIDDEN_SIZE, INTERMEDIATE_SIZE, HEAD_SIZE = 114, 334, 38
"""3 query heads and 1 key and value head: matrices of 114 x 114, 38 x 114, 334 x 114 and 114 x 334 weights. 4 divides
the bytes of no packed one, and 2 neither the blocks of the largest nor its active weights at 5 %. The columns are even,
since for odd ones bitsandbytes compiles a kernel on the CPU."""
WORDS = ["<unk>", "</s>", "the", "of", "is", "number", "list", "dog", "key", "sun", *map(str, range(16))]


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random fp32 Llama with two blocks and a tokenizer of 26 words."""
    folder = tmp_path_factory.mktemp("tiny_base")
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 1,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=INTERMEDIATE_SIZE,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=HEAD_SIZE,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file with 48 short texts."""
    path = tmp_path_factory.mktemp("tiny_data") / "texts.jsonl"
    rows = [{"text": f"the {word} is number {number} of the list"} for number in range(16) for word in WORDS[7:10]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
