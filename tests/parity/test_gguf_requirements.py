"""A merged Llama has what llama.cpp's converter asks for: names in gguf's tensor map, dtypes, config, tokenizer.

The converter is a script of llama.cpp and not installed; its tables and tokenizer readers are, as the package `gguf`.
What it asks of config.json is listed here from `convert_hf_to_gguf.py` (TextModel and LlamaModel, 2026).
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from sparse_ds.adapter.adapter import AdapterBase, AdapterConfig
from sparse_ds.adapter.native import save_adapter
from sparse_ds.embedded import resolve_model
from sparse_ds.export.merged import merge_adapter

DTYPES = {"F32", "F16", "BF16"}
"""That the converter reads."""
CONFIG_KEYS = (
    ["num_hidden_layers"],
    ["hidden_size"],
    ["intermediate_size"],
    ["num_attention_heads"],
    ["num_key_value_heads"],
    ["rms_norm_eps"],
    ["max_position_embeddings"],
    ["vocab_size"],
    ["rope_theta", "rope_parameters"],
)
"""Of each one name has to be there."""


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    name = "model.layers.0.mlp.down_proj"
    rows, cols = AutoModelForCausalLM.from_pretrained(resolve_model("embedded")).get_submodule(name).weight.shape
    base = AdapterBase(name="embedded", quantization="nf4", dtype="bfloat16")
    config = AdapterConfig(method="sparta", density=0.01, base=base, shapes={name: (rows, cols)})
    indices = torch.arange(0, rows * cols, 101)
    save_adapter(folder / "adapter", [(name, indices, torch.full(indices.shape, 0.01))], config=config)
    merge_adapter("embedded", folder / "adapter", folder / "merged", max_shard_size="1MB")
    return folder / "merged"


def test_names_and_dtypes_are_those_of_the_tensor_map(merged: Path) -> None:
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    num_layers, architecture = config["num_hidden_layers"], gguf.MODEL_ARCH.LLAMA
    tensor_map = gguf.get_tensor_name_map(architecture, num_layers)
    found = set()
    for path in merged.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                assert file.get_slice(name).get_dtype() in DTYPES
                mapped = tensor_map.get_name(name, try_suffixes=(".weight", ".bias"))
                assert mapped is not None, name
                found.add(mapped)
    blocks = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_down", "ffn_up")
    needed = {f"blk.{layer}.{part}.weight" for layer in range(num_layers) for part in blocks}
    needed |= {"token_embd.weight", "output_norm.weight"}
    assert needed <= found <= needed | {"output.weight"}
    assert ("output.weight" in found) != config["tie_word_embeddings"]


def test_index_and_config_are_complete(merged: Path) -> None:
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"] and "quantization_config" not in config
    for names in CONFIG_KEYS:
        assert any(name in config for name in names), names
    index = json.loads((merged / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert {path.name for path in merged.glob("*.safetensors")} == set(index["weight_map"].values())
    # Byte for byte what transformers writes of the same model.
    AutoModelForCausalLM.from_pretrained(merged).save_pretrained(merged.parent / "saved", max_shard_size="1MB")
    for name in ["model.safetensors.index.json", *sorted(set(index["weight_map"].values()))]:
        ours, theirs = (folder / name for folder in (merged, merged.parent / "saved"))
        if name.endswith(".json"):
            assert json.loads(ours.read_text()) == json.loads(theirs.read_text())
        else:
            assert ours.read_bytes() == theirs.read_bytes()


def test_the_tokenizer_is_read(merged: Path) -> None:
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    vocabulary = gguf.LlamaHfVocab(merged)
    tokens = list(vocabulary.all_tokens())
    assert 0 < len(tokens) <= config["vocab_size"]
    assert len(list(gguf.SentencePieceVocab(merged).all_tokens())) <= config["vocab_size"]
    special = gguf.SpecialVocab(merged, n_vocab=len(tokens))
    assert special.special_token_ids["bos"] == config["bos_token_id"]
    assert special.special_token_ids["eos"] == config["eos_token_id"]
    # A chat template beside the tokenizer goes along.
    assert special.chat_template is None
    (merged / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert gguf.SpecialVocab(merged, n_vocab=len(tokens)).chat_template == "{{ messages }}"
