"""A tiny random model of every architecture, as it lies on the hub: names, tokenizer, unused heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizer,
)

SIZES: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.1}
# The root of 40, by which Gemma-2 multiplies its embeddings, is no number of 16 bits.
DECODER_SIZES: dict[str, Any] = {
    **SIZES,
    "hidden_size": 40,
    "intermediate_size": 46,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
ENCODER_SIZES: dict[str, Any] = {**SIZES, "hidden_size": 32, "intermediate_size": 46}


def save_model(model_type: str, folder: Path, words: list[str]) -> None:
    """The folder of a base model whose tokenizer knows the given words."""
    torch.manual_seed(0)
    {"mistral": _save_mistral, "gemma2": _save_gemma2, "bert": _save_bert, "roberta": _save_roberta}[model_type](
        folder, words
    )


def _save_mistral(folder: Path, words: list[str]) -> None:
    num_words = _save_decoder_tokenizer(folder, ["<unk>", "<s>", "</s>"], words)
    config = MistralConfig(**DECODER_SIZES, vocab_size=num_words, sliding_window=4, bos_token_id=1, eos_token_id=2)
    MistralForCausalLM(config).save_pretrained(folder)


def _save_gemma2(folder: Path, words: list[str]) -> None:
    """Soft caps and a sliding window that are felt; norms that are not 1."""
    num_words = _save_decoder_tokenizer(folder, ["<pad>", "</s>", "<s>", "<unk>"], words, pad_token="<pad>")
    caps = {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0, "sliding_window": 4}
    model = Gemma2ForCausalLM(Gemma2Config(**DECODER_SIZES, **caps, vocab_size=num_words, query_pre_attn_scalar=8))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)


def _save_bert(folder: Path, words: list[str]) -> None:
    """With the head of its pre-training and the names of old files."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)}).save_pretrained(folder)
    # 22 positions are no multiple of 8.
    config = BertConfig(**ENCODER_SIZES, vocab_size=len(vocabulary), max_position_embeddings=22)
    model = BertForPreTraining(config)
    _randomize_vectors(model)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    old: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        old[name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")] = tensor
    old["bert.embeddings.position_ids"] = torch.arange(22)[None]
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})


def _save_roberta(folder: Path, words: list[str]) -> None:
    """The base model alone, so that no name has the prefix; its pooler is of no use. Letters are its tokens."""
    letters = sorted({letter for word in words for letter in word} | {"\u0120", "\u010a"})
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters]
    RobertaTokenizer(vocab={word: number for number, word in enumerate(vocabulary)}, merges=[]).save_pretrained(folder)
    config = RobertaConfig(
        **ENCODER_SIZES, vocab_size=len(vocabulary), max_position_embeddings=60, type_vocab_size=1, pad_token_id=1
    )
    model = RobertaModel(config)
    _randomize_vectors(model)
    model.save_pretrained(folder)


def _randomize_vectors(model: PreTrainedModel) -> None:
    """Biases and norms that are felt, and words that tell each other apart from the start."""
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("LayerNorm.weight") else 0.0, std=0.2)


def _save_decoder_tokenizer(folder: Path, special: list[str], words: list[str], **others: str) -> int:
    vocabulary = {word: number for number, word in enumerate([*special, *words])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **others
    ).save_pretrained(folder)
    return len(vocabulary)
