"""Merged checkpoints in plain transformers, against merges written independently here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from adapter_items import Deltas, MakeAdapter, MakeBase, as_items
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from sparse_ds.adapter.adapter import AdapterConfig
from sparse_ds.adapter.native import load_adapter, save_adapter
from sparse_ds.config.errors import UserError
from sparse_ds.export import checkpoint_writer
from sparse_ds.export.merged import merge_adapter
from sparse_ds.export.model_card import dense_model_card

Q_PROJ = "model.layers.0.self_attn.q_proj"


def edited_model(base: Path, deltas: Deltas, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """The oracle: load the base as transformers does, and edit the weights in place one entry at a time."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    with torch.no_grad():
        for name, (indices, values) in deltas.items():
            weight = model.get_submodule(name).weight
            for index, value in zip(indices.tolist(), values, strict=True):
                row, col = divmod(index, weight.shape[1])
                weight[row, col] = (weight[row, col].float() + value).to(dtype)
    return model


def assert_same_model(merged: Path, expected: torch.nn.Module) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(merged)
    expected_weights = expected.state_dict()
    assert loaded.state_dict().keys() == expected_weights.keys()
    for name, weight in loaded.state_dict().items():
        assert weight.dtype == expected_weights[name].dtype
        assert torch.equal(weight, expected_weights[name]), name
    tokens = torch.arange(10)[None]
    assert torch.equal(loaded(tokens).logits, expected(tokens).logits)


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_size", ["5GB", "6KB"])
def test_merged_equals_the_edited_model(
    make_base: MakeBase,
    make_adapter: MakeAdapter,
    deltas: Deltas,
    tmp_path: Path,
    architecture: str,
    tied: bool,
    max_shard_size: str,
) -> None:
    base = make_base(architecture, tied=tied, max_shard_size=max_shard_size)
    report = merge_adapter(base, make_adapter(), tmp_path / "merged", max_shard_size=max_shard_size)
    assert_same_model(tmp_path / "merged", edited_model(base, deltas))
    assert (report.checkpoint.num_shards > 1) == (max_shard_size == "6KB")
    stored = set()
    for path in (tmp_path / "merged").glob("*.safetensors"):
        stored |= load_file(path).keys()
    assert ("lm_head.weight" in stored) == (not tied)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("a b")["input_ids"] == [1, 2]


def test_weights_outside_the_indices_are_the_base(
    make_base: MakeBase, make_adapter: MakeAdapter, deltas: Deltas, tmp_path: Path
) -> None:
    base = make_base()
    report = merge_adapter(base, make_adapter(), tmp_path / "merged")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    num_changed = sum(int((before[name].bfloat16() != after[name]).sum()) for name in before)
    num_deltas = sum(indices.numel() for indices, _ in deltas.values())
    assert report.num_deltas == report.num_nonzero_deltas == num_deltas
    assert num_changed == num_deltas - report.num_hidden_deltas
    # Every fifth delta is 1e-7: hidden unless its weight is itself as small.
    assert report.num_hidden_deltas >= num_deltas // 6


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("double_quantization", [False, True])
def test_nf4_merge_equals_direct_bitsandbytes_calls(
    make_base: MakeBase,
    make_adapter: MakeAdapter,
    deltas: Deltas,
    tmp_path: Path,
    dtype: str,
    double_quantization: bool,
) -> None:
    base = make_base()
    adapter = make_adapter(quantization="nf4", double_quantization=double_quantization, dtype=dtype)
    merge_adapter(base, adapter, tmp_path / "merged", dtype=dtype)
    expected = edited_model(base, {}, getattr(torch, dtype))
    with torch.no_grad():
        for name, (indices, values) in deltas.items():
            weight = expected.get_submodule(name).weight
            packed, state = bnb.quantize_4bit(
                weight.data, blocksize=64, quant_type="nf4", compress_statistics=double_quantization
            )
            dequantized = bnb.dequantize_4bit(packed, state)
            assert not torch.equal(dequantized, weight)
            flat = dequantized.flatten()
            flat[indices.long()] = (flat[indices.long()].float() + values).to(flat.dtype)
            weight.copy_(flat.view_as(weight))
    assert_same_model(tmp_path / "merged", expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_output_dtype_is_a_cast_of_the_trained_model(
    make_base: MakeBase, make_adapter: MakeAdapter, deltas: Deltas, tmp_path: Path, dtype: str
) -> None:
    base = make_base()
    merge_adapter(base, make_adapter(dtype="bfloat16"), tmp_path / "merged", dtype=dtype)
    assert_same_model(tmp_path / "merged", edited_model(base, deltas, torch.bfloat16).to(getattr(torch, dtype)))


@pytest.mark.parametrize("sharded", [False, True])
def test_bin_base(
    make_base: MakeBase,
    make_adapter: MakeAdapter,
    deltas: Deltas,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    sharded: bool,
) -> None:
    base = make_base(tied=True)
    tensors = load_file(base / "model.safetensors")
    # torch's own format keeps both names of a tied tensor, on one storage; old Llama files hold stale buffers too.
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    expected = edited_model(base, deltas)
    (base / "model.safetensors").unlink()
    if sharded:
        files = {name: f"pytorch_model-{1 + i % 2:05d}-of-00002.bin" for i, name in enumerate(tensors)}
        for file in set(files.values()):
            torch.save({name: tensor for name, tensor in tensors.items() if files[name] == file}, base / file)
        (base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        torch.save(tensors, base / "pytorch_model.bin")
    merge_adapter(base, make_adapter(), tmp_path / "merged")
    assert_same_model(tmp_path / "merged", expected)
    assert (
        load_file(tmp_path / "merged" / "model.safetensors")
        .keys()
        .isdisjoint({"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"})
    )
    assert "has no safetensors weights" in caplog.text


def test_untied_bin_base_with_two_names_on_one_storage(
    make_base: MakeBase, make_adapter: MakeAdapter, deltas: Deltas, tmp_path: Path
) -> None:
    base = make_base()
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    (base / "model.safetensors").unlink()
    torch.save(tensors, base / "pytorch_model.bin")
    merge_adapter(base, make_adapter(), tmp_path / "merged")
    assert_same_model(tmp_path / "merged", edited_model(base, deltas))


def test_merged_loads_in_a_process_without_this_project(
    make_base: MakeBase, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    merge_adapter(make_base(), make_adapter(), tmp_path / "merged", max_shard_size="6KB")
    script = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'merged')!r})\n"
        f"AutoTokenizer.from_pretrained({str(tmp_path / 'merged')!r})\n"
        "assert not [name for name in sys.modules if name.startswith('sparse_ds')]\n"
        "print(model.dtype)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert result.stdout.strip() == "torch.bfloat16"


def test_model_card_says_what_was_merged(make_base: MakeBase, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = load_adapter(make_adapter(quantization="nf4"))
    merge_adapter(make_base(), adapter, tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "base_model: owner/tiny" in card
    assert "trained weights: 153 of 1,536 in 2 matrices" in card
    assert "4-bit NF4 base (blocks of 64)" in card
    assert adapter.config.index_hash in card


def test_model_card_of_a_local_base_names_no_path_of_this_machine(
    make_base: MakeBase, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = make_base()
    merge_adapter(base, make_adapter(name=str(base)), tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "# llama_base, sparsely fine-tuned" in card
    assert "base_model" not in card and str(tmp_path) not in card


@pytest.mark.parametrize(
    ("base_name", "title", "on_hub"),
    [("owner/model", "# owner/model, fine-tuned", True), ("/data/private/model", "# model, fine-tuned", False)],
)
def test_model_card_of_a_dense_model(base_name: str, title: str, on_hub: bool) -> None:
    card = dense_model_card(base_name)
    assert title in card and "private" not in card
    assert (f"base_model: {base_name}" in card) == on_hub


def test_tokenizer_from_another_folder(make_base: MakeBase, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    base = make_base()
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "changed"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    merge_adapter(base, make_adapter(), tmp_path / "merged", tokenizer=tmp_path / "tokenizer")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == "changed"


def test_base_files_stay_as_they_are(make_base: MakeBase, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    base = make_base()
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    merge_adapter(base, make_adapter(dtype="float32"), tmp_path / "merged", dtype="float32")
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


def test_full_disk_leaves_nothing(
    make_base: MakeBase, make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    base, adapter = make_base(), make_adapter()
    monkeypatch.setattr(checkpoint_writer.TensorFile, "write", disk_full)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(RuntimeError, match="No space left on device"):
        merge_adapter(base, adapter, tmp_path / "merged")
    assert sorted(os.listdir(tmp_path)) == before


def test_overwrite_replaces_an_earlier_merge(
    make_base: MakeBase, make_adapter: MakeAdapter, deltas: Deltas, tmp_path: Path
) -> None:
    base, adapter = make_base(), make_adapter()
    merge_adapter(base, adapter, tmp_path / "merged", max_shard_size="6KB")
    with pytest.raises(UserError, match="already exists and is not empty"):
        merge_adapter(base, adapter, tmp_path / "merged")
    merge_adapter(base, adapter, tmp_path / "merged", overwrite=True)
    assert not (tmp_path / "merged" / "model.safetensors.index.json").exists()
    assert_same_model(tmp_path / "merged", edited_model(base, deltas))


@pytest.mark.parametrize("onto", ["base", "adapter", "parent"])
def test_output_on_top_of_an_input_is_refused(
    make_base: MakeBase, make_adapter: MakeAdapter, tmp_path: Path, onto: str
) -> None:
    base, adapter = make_base(), make_adapter()
    output = {"base": base, "adapter": adapter, "parent": tmp_path}[onto]
    with pytest.raises(UserError, match=r"which is being read\. Give another path"):
        merge_adapter(base, adapter, output, overwrite=True)
    assert (base / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden_size": 32},
            r"'model\.layers\.0\.self_attn\.q_proj\.weight' has shape \[24, 24\]; base .* has shape \[32, 32\]",
        ),
        ({"num_hidden_layers": 1}, r"'model\.layers\.1\.mlp\.down_proj\.weight' .* has no such parameter of its own"),
    ],
)
def test_base_of_another_shape(
    make_base: MakeBase, make_adapter: MakeAdapter, tmp_path: Path, change: dict[str, int], message: str
) -> None:
    base = make_base()
    config = AutoModelForCausalLM.from_pretrained(base).config
    for key, value in change.items():
        setattr(config, key, value)
    config.head_dim = config.hidden_size // config.num_attention_heads
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    with pytest.raises(UserError, match=message):
        merge_adapter(base, make_adapter(), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_incomplete_base(make_base: MakeBase, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    base = make_base()
    tensors = load_file(base / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"has no tensor 'model\.norm\.weight'.*\(1 are missing\)"):
        merge_adapter(base, make_adapter(), tmp_path / "merged")


def test_base_whose_tensor_contradicts_its_config(
    make_base: MakeBase, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = make_base()
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(25)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"Tensor 'model\.norm\.weight' of base .* has shape \[25\].*expected shape \[24\]"
    ):
        merge_adapter(base, make_adapter(), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_base_that_is_quantized_otherwise(make_base: MakeBase, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    base = make_base()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UserError, match=r"is quantized by 'gptq' .* expected a 16-bit checkpoint, or bitsandbytes NF4"):
        merge_adapter(base, make_adapter(), tmp_path / "merged")


def test_revision_of_the_adapter_is_used_for_the_same_hub_base(
    make_base: MakeBase, make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = make_base(), make_adapter(revision="abc")
    asked = []

    def find(name: str, revision: str | None) -> Path:
        asked.append((name, revision))
        return base

    monkeypatch.setattr("sparse_ds.export.merged.find_base_model", find)
    merge_adapter("owner/tiny", adapter, tmp_path / "one")
    merge_adapter("owner/copy", adapter, tmp_path / "two")
    merge_adapter("owner/tiny", adapter, tmp_path / "three", revision="def")
    assert asked == [("owner/tiny", "abc"), ("owner/copy", None), ("owner/tiny", "def")]


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_classifier(
    make_base: MakeBase, adapter_config: AdapterConfig, deltas: Deltas, tmp_path: Path, architecture: str, tied: bool
) -> None:
    """Body and head in one folder that says what its labels are; the vocabulary's matrix is gone."""
    base, head = make_base(architecture, tied=tied), torch.randn(3, 24)
    labels = ("no", "yes", "maybe")
    changes = {"dense_shapes": {"score.weight": (3, 24)}, "task": "sequence_classification", "labels": labels}
    config = adapter_config.model_copy(update={**changes, "pad_token_id": 2})
    save_adapter(tmp_path / "adapter", as_items(deltas), config=config, dense={"score.weight": head})
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert type(model).__name__ == model.config.architectures[0]
    assert model.config.id2label == dict(enumerate(labels))
    assert model.config.label2id == {label: number for number, label in enumerate(labels)}
    assert (model.config.pad_token_id, model.config.problem_type) == (2, "single_label_classification")
    assert torch.equal(model.score.weight, head)
    body = edited_model(base, deltas).float()
    tokens = torch.tensor([[1, 1, 3, 2, 2]])
    with torch.no_grad():
        logits = model(tokens).logits
        hidden = body.model(tokens).last_hidden_state
    assert torch.allclose(logits[0], hidden[0, 2] @ head.T, rtol=1e-5, atol=1e-6)
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")
    readme = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert "AutoModelForSequenceClassification" in readme and "labels: no, yes, maybe" in readme


def test_a_head_of_another_size_is_refused(
    make_base: MakeBase, adapter_config: AdapterConfig, deltas: Deltas, tmp_path: Path
) -> None:
    changes = {"dense_shapes": {"score.weight": (2, 8)}, "task": "sequence_classification", "labels": ("no", "yes")}
    config = adapter_config.model_copy(update={**changes, "pad_token_id": 2})
    save_adapter(tmp_path / "adapter", as_items(deltas), config=config, dense={"score.weight": torch.zeros(2, 8)})
    with pytest.raises(UserError, match=r"'score.weight' has shape \[2, 8\]; base .* has shape \[2, 24\]"):
        merge_adapter(make_base(), tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_biases_and_norms(
    make_base: MakeBase, adapter_config: AdapterConfig, tmp_path: Path, quantization: str
) -> None:
    """Vectors are never quantized: their deltas lie on the base's own numbers."""
    base = make_base(attention_bias=True)
    indices, values = torch.tensor([1, 5, 23], dtype=torch.int32), torch.tensor([0.5, -0.25, 1.0])
    tensors = {
        "model.norm": "model.norm.weight",
        "model.layers.1.input_layernorm": "model.layers.1.input_layernorm.weight",
        f"{Q_PROJ}.bias": f"{Q_PROJ}.bias",
    }
    trained = adapter_config.base.model_copy(update={"quantization": quantization})
    config = adapter_config.model_copy(update={"shapes": dict.fromkeys(tensors, (24, 1)), "base": trained})
    save_adapter(tmp_path / "adapter", ((name, indices.clone(), values.clone()) for name in tensors), config=config)
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    stored, merged = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in merged.items():
        expected = stored[name].bfloat16()
        if name in tensors.values():
            expected[indices.long()] = (expected[indices.long()].float() + values).bfloat16()
        assert torch.equal(tensor, expected), name
    wrong = adapter_config.model_copy(update={"shapes": {"model.norm": (30, 1)}})
    save_adapter(tmp_path / "wrong", [("model.norm", indices, values)], config=wrong)
    with pytest.raises(UserError, match=r"'model.norm.weight' has shape \[30, 1\]; base .* has shape \[24\]"):
        merge_adapter(base, tmp_path / "wrong", tmp_path / "other")
