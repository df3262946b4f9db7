"""Tiny random checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_doubles import EditTensors, MakeCheckpoint, WholeParameters
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture
def whole() -> Any:
    return WholeParameters()


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """make_checkpoint(edit, bin=..., max_shard_size=..., config={...}, <sizes>) -> folder of a bf16 Llama.

    `edit(tensors)` changes the stored tensors in place, `config` entries of config.json.
    """

    def make(
        edit: EditTensors | None = None,
        *,
        bin: bool = False,
        max_shard_size: str = "5GB",
        config: dict[str, Any] | None = None,
        **sizes: Any,
    ) -> Path:
        folder = tmp_path / "checkpoint"
        torch.manual_seed(0)
        defaults = {
            "vocab_size": 20,
            "hidden_size": 12,
            "intermediate_size": 18,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 32,
            "tie_word_embeddings": False,
        }
        model = LlamaForCausalLM(LlamaConfig(**{**defaults, **sizes})).bfloat16()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if edit is not None:
            tensors = load_file(folder / "model.safetensors")
            edit(tensors)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        if bin:
            torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink()
        if config is not None:
            content = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**content, **config}))
        return folder

    return make
