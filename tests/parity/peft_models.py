"""A tiny random Llama, adapters of it with awkward numbers of deltas, and the trained model as plain torch makes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparse_ds.adapter.adapter import AdapterBase, AdapterConfig
from sparse_ds.adapter.native import NativeAdapter, load_adapter, save_adapter

TOKENS = torch.arange(24).view(2, 12)
SHAPES = {
    "model.layers.0.self_attn.q_proj": (128, 128),
    "model.layers.0.self_attn.k_proj": (64, 128),
    "model.layers.0.mlp.down_proj": (128, 192),
    "model.layers.1.mlp.up_proj": (192, 128),
    "model.layers.1.mlp.down_proj": (128, 192),
}
NUM_ACTIVE = (700, 1, 0, 2001, 1234)
"""Of the modules above: no one density gives these numbers."""
ALL_SHAPES = {
    f"model.layers.{layer}.{name}": shape
    for layer in (0, 1)
    for name, shape in {
        "self_attn.q_proj": (128, 128),
        "self_attn.k_proj": (64, 128),
        "self_attn.v_proj": (64, 128),
        "self_attn.o_proj": (128, 128),
        "mlp.gate_proj": (192, 128),
        "mlp.up_proj": (192, 128),
        "mlp.down_proj": (128, 192),
    }.items()
}
LABELS = ("no", "yes", "maybe")


def make_base(folder: Path, *, dtype: torch.dtype = torch.float32, tied: bool = False) -> Path:
    """A checkpoint with a tokenizer. Its sizes are the smallest that bitsandbytes multiplies in 4 bits on a CPU."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)).to(dtype).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


def make_adapter(
    folder: Path,
    base: Path,
    *,
    dtype: str = "float32",
    quantization: str = "none",
    double_quantization: bool = False,
    scale: float = 0.01,
    classifier: bool = False,
    all_linear: bool = False,
) -> NativeAdapter:
    """Deltas ~ N(0, scale^2) at random places of `SHAPES`, or of all linear layers (5 %); the first matrix has one at
    index 0."""
    generator = torch.Generator().manual_seed(1)
    items = []
    shapes = ALL_SHAPES if all_linear else SHAPES
    for number, (name, (rows, cols)) in enumerate(shapes.items()):
        num_active = rows * cols // 20 if all_linear else NUM_ACTIVE[number]
        indices = torch.randperm(rows * cols, generator=generator)[:num_active].sort().values
        if number == 0:
            indices[0] = 0
        items.append((name, indices, torch.randn(num_active, generator=generator) * scale))
    changes: dict[str, Any] = {}
    dense: dict[str, Tensor] = {}
    if classifier:
        dense = {"score.weight": torch.randn(len(LABELS), 128, generator=generator)}
        changes = {"task": "sequence_classification", "labels": LABELS, "pad_token_id": 3}
        changes["dense_shapes"] = {"score.weight": (len(LABELS), 128)}
    trained_on = AdapterBase.model_validate(
        {"name": str(base), "dtype": dtype, "quantization": quantization, "double_quantization": double_quantization}
    )
    config = AdapterConfig(method="sft_ag", density=0.05, base=trained_on, shapes=shapes, **changes)
    save_adapter(folder, items, config=config, dense=dense)
    return load_adapter(folder)


def edited_model(base: Path, adapter: NativeAdapter, dtype: torch.dtype) -> torch.nn.Module:
    """The oracle: transformers' model, every delta put into its weight as round(fp32 w + fp32 value)."""
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    with torch.no_grad():
        for name, (indices, values) in adapter.items():
            flat = model.get_submodule(name).weight.view(-1)
            flat[indices.long()] = (flat[indices.long()].float() + values).to(dtype)
    return model


def logits(model: Any, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(TOKENS, **inputs).logits
    return result
