"""The hash of a base model: the same for the same weights in any form, another one for others."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_ds.export.quantized import write_nf4_checkpoint
from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.model.weights_hash import weights_hash

SHAPES = {
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.mlp.down_proj.weight": (64, 128),
    "model.norm.weight": (64, 1),
}


def make_base(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 32}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_attention_heads=4, **sizes))
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def hash_of(folder: Path, dtype: torch.dtype = torch.bfloat16) -> str | None:
    return weights_hash(BaseCheckpoint(folder), SHAPES, dtype)


def test_the_form_does_not_matter_but_the_weights_do(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    expected = hash_of(base)
    assert expected is not None and len(expected) == 64
    LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "bf16", max_shard_size="9KB"
    )
    assert hash_of(tmp_path / "bf16") == expected
    assert hash_of(base, torch.float32) != hash_of(tmp_path / "bf16", torch.float32)

    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][32] += 0.1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert hash_of(base) != expected


def test_a_base_in_nf4_has_none(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    write_nf4_checkpoint(base, tmp_path / "nf4")
    assert hash_of(tmp_path / "nf4") is None
    assert weights_hash(BaseCheckpoint(base), {"model.layers.7.mlp.down_proj.weight": (4, 4)}, torch.bfloat16) is None
