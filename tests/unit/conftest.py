"""Tiny random base models on disk, and adapters for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_items import Deltas, MakeAdapter, MakeBase, as_items
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from sparse_ds.adapter.adapter import AdapterBase, AdapterConfig
from sparse_ds.adapter.native import save_adapter

MODEL_SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture
def make_base(tmp_path: Path) -> MakeBase:
    """make_base(architecture, tied=..., max_shard_size=..., <sizes>) -> folder of an fp32 checkpoint."""

    def make(architecture: str = "llama", *, tied: bool = False, max_shard_size: str = "5GB", **sizes: int) -> Path:
        config_class, model_class = {
            "llama": (LlamaConfig, LlamaForCausalLM),
            "mistral": (MistralConfig, MistralForCausalLM),
        }[architecture]
        torch.manual_seed(0)
        model = model_class(config_class(**{**MODEL_SIZES, **sizes}, tie_word_embeddings=tied))
        folder = tmp_path / f"{architecture}_base"
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        words = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
        words.pre_tokenizer = Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def target_shapes() -> dict[str, tuple[int, int]]:
    """Two target modules of the tiny models, one of them not square."""
    return {"model.layers.0.self_attn.q_proj": (24, 24), "model.layers.1.mlp.down_proj": (24, 40)}


@pytest.fixture
def deltas(target_shapes: dict[str, tuple[int, int]]) -> Deltas:
    """Module name -> (ascending indices, values) at 10 % density, with large and tiny values."""
    generator = torch.Generator().manual_seed(1)
    result = {}
    for name, (rows, cols) in target_shapes.items():
        num_active = rows * cols // 10
        indices = torch.randperm(rows * cols, generator=generator)[:num_active].sort().values
        values = torch.randn(num_active, generator=generator) * 0.05
        values[::5] = 1e-7  # hidden by the rounding to bf16
        result[name] = (indices.int(), values)
    return result


@pytest.fixture
def adapter_config(target_shapes: dict[str, tuple[int, int]]) -> AdapterConfig:
    base = AdapterBase(name="owner/tiny", quantization="none", dtype="bfloat16")
    return AdapterConfig(method="sft_ma", density=0.1, base=base, shapes=target_shapes)


@pytest.fixture
def make_adapter(tmp_path: Path, adapter_config: AdapterConfig, deltas: Deltas) -> MakeAdapter:
    """make_adapter(quantization=..., double_quantization=..., dtype=...) -> folder of a saved adapter."""

    def make(**base_fields: object) -> Path:
        base = AdapterBase.model_validate({**adapter_config.base.model_dump(), **base_fields})
        folder = tmp_path / "adapter"
        save_adapter(folder, as_items(deltas), config=adapter_config.model_copy(update={"base": base}))
        return folder

    return make
