"""A tokenizer of single characters, and the embedded model in plain transformers."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sparse_ds.embedded import resolve_model

SPECIAL = ["<unk>", "<s>", "</s>", "<|turn|>", "<|end|>"]  # ids 0 to 4


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Ids are `5 + byte`, with one merge, `ab` = 133; `<s>` in front of every text."""
    vocabulary = {token: number for number, token in enumerate(SPECIAL)}
    vocabulary |= {chr(byte): 5 + byte for byte in range(128)}
    vocabulary["ab"] = 133
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b")], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|turn|>", "<|end|>"],
    )


@pytest.fixture(scope="session")
def embedded() -> tuple[Any, PreTrainedTokenizerFast]:
    """(model in fp32, tokenizer)"""
    folder = resolve_model("embedded")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    return model, AutoTokenizer.from_pretrained(folder)
