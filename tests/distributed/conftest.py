"""A tiny random base model of sizes that do not divide, and its data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sparse_ds.embedded import resolve_model

HIDDEN_SIZE, INTERMEDIATE_SIZE, HEAD_SIZE = 114, 331, 38
"""3 query heads and 1 key and value head: matrices of 114 x 114, 38 x 114, 331 x 114 and 114 x 331 weights, of which
none has a number of weights, bytes or blocks that 2 or 4 divide."""


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random fp32 Llama with two blocks and the embedded tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_base")
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("embedded"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=INTERMEDIATE_SIZE,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=HEAD_SIZE,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file with 48 short texts."""
    path = tmp_path_factory.mktemp("tiny_data") / "texts.jsonl"
    rows = [{"text": f"the {word} is number {number} of the list"} for number in range(16) for word in ("dog", "key", "sun")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
