"""What `inspect_adapter` reports, against numbers taken from the stored file itself."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_items import Deltas, MakeAdapter, as_items
from safetensors.numpy import load_file

from sparse_ds.adapter.adapter import AdapterConfig
from sparse_ds.adapter.combining import CombinedAdapter
from sparse_ds.adapter.inspection import inspect_adapter
from sparse_ds.adapter.native import load_adapter, save_adapter

DOWN_PROJ = "model.layers.1.mlp.down_proj"


def test_numbers(make_adapter: MakeAdapter, deltas: Deltas) -> None:
    folder = make_adapter(quantization="nf4", double_quantization=True)
    report = inspect_adapter(load_adapter(folder))
    stored = load_file(folder / "adapter_model.safetensors")
    values = {name: stored[f"{name}.values"] for name in deltas}
    assert report.num_active == sum(len(own) for own in values.values()) == 57 + 96
    assert report.num_weights == 24 * 24 + 24 * 40 and report.density == (57 + 96) / (24 * 24 + 24 * 40)
    for name, own in values.items():
        module = report.modules[name]
        assert (module.num_active, module.density) == (len(own), len(own) / math.prod(module.shape))
        assert module.largest_value == np.abs(own).max()
        assert module.norm == pytest.approx(np.linalg.norm(own.astype(np.float64)))
    everything = np.concatenate(list(values.values())).astype(np.float64)
    assert report.histogram == dict(sorted(Counter(int(np.floor(np.log2(abs(v)))) for v in everything).items()))
    digests = b"".join(
        hashlib.sha256(f"{name}\0{len(values[name])}\0".encode() + values[name].astype("<f4").tobytes()).digest()
        for name in sorted(values)
    )
    assert report.values_sha256 == hashlib.sha256(digests).hexdigest()
    assert report.indices_sha256 == json.loads((folder / "adapter_config.json").read_text())["index_hash"]
    assert report.size_bytes == (folder / "adapter_model.safetensors").stat().st_size
    assert report.bytes_per_delta == report.size_bytes / report.num_active
    assert report.birth_steps is None and report.num_zeros == 0


def test_octaves_zeros_and_ages(tmp_path: Path, adapter_config: AdapterConfig) -> None:
    """Exactly at a power of two, below it, subnormal, the largest number, and 0, which is in no octave."""
    numbers = [1.0, 0.99999994, -2.0, 3.0, 0.0, -0.0, 1e-45, 3.4028235e38]
    config = adapter_config.model_copy(update={"shapes": {DOWN_PROJ: (24, 40)}, "birth_steps": {25: 3, 5: 5}})
    items = [(DOWN_PROJ, torch.arange(8), torch.tensor(numbers))]
    save_adapter(tmp_path / "adapter", items, config=config)
    report = inspect_adapter(load_adapter(tmp_path / "adapter"))
    assert report.histogram == {-149: 1, -1: 1, 0: 1, 1: 2, 127: 1}
    assert report.num_zeros == report.modules[DOWN_PROJ].num_zeros == 2
    assert list(report.birth_steps.items()) == [(5, 5), (25, 3)]
    lines = report.table().splitlines()
    assert next(line for line in lines if line.startswith("2^1 ")).split()[:3] == ["2^1", "2.00e+00", "2"]
    assert lines[lines.index("trained since step") + 1].split() == ["5", "5"]


def test_no_deltas_at_all(tmp_path: Path, adapter_config: AdapterConfig) -> None:
    config = adapter_config.model_copy(update={"shapes": {DOWN_PROJ: (24, 40)}})
    save_adapter(tmp_path / "adapter", [(DOWN_PROJ, torch.arange(0), torch.zeros(0))], config=config)
    report = inspect_adapter(load_adapter(tmp_path / "adapter"))
    assert (report.num_active, report.density, report.histogram, report.bytes_per_delta) == (0, 0, {}, None)
    assert report.modules[DOWN_PROJ].largest_value == 0
    assert "0 of 960" in report.table()


def test_table_and_json(tmp_path: Path, adapter_config: AdapterConfig) -> None:
    """A model of twelve layers with biases and norms: K of every module, in lines of 100 columns."""
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.q_proj.bias", "mlp.gate_proj", "mlp.up_proj")
    kinds += ("mlp.down_proj", "self_attn.o_proj", "self_attn.v_proj", "input_layernorm")
    shapes = {f"model.layers.{layer}.{kind}": (64, 64) for layer in range(12) for kind in kinds}
    shapes["model.norm"] = (64, 1)
    items = [
        (name, torch.arange(number % 60 + 1), torch.full((number % 60 + 1,), 0.5)) for number, name in enumerate(shapes)
    ]
    head = {"dense_shapes": {"score.weight": (2, 64)}, "task": "sequence_classification", "labels": ("no", "yes")}
    config = adapter_config.model_copy(update={"shapes": shapes, **head, "pad_token_id": 0})
    save_adapter(tmp_path / "adapter", items, config=config, dense={"score.weight": torch.ones(2, 64)})
    report = inspect_adapter(load_adapter(tmp_path / "adapter"))
    lines = report.table().splitlines()
    assert all(len(line) <= 100 for line in lines if not line.startswith("adapter "))
    header = next(number for number, line in enumerate(lines) if "q_proj.bias" in line)
    row = lines[header + 1 + 10].split()  # of layer 10
    assert row[0] == "10"
    found = dict(zip(lines[header].split()[3:], row[1:], strict=True))  # behind "K in layer"
    assert found["q_proj.bias"] == str(len(items[10 * len(kinds) + kinds.index("self_attn.q_proj.bias")][1]))
    assert "model.norm  49 of 64" in lines
    assert any(line.startswith("score.weight") and "[2, 64], trained as a whole" in line for line in lines)
    assert any(line.startswith("task") and line.endswith("sequence_classification: no, yes") for line in lines)
    assert report.num_dense == 128
    assert report.bytes_per_delta == (report.size_bytes - 4 * 128) / report.num_active
    content = json.loads(json.dumps(report.to_dict()))
    assert content["modules"]["model.layers.10.input_layernorm"]["shape"] == [64, 64]
    assert content["histogram"] == {"-1": report.num_active}
    assert content["base"]["name"] == "owner/tiny" and content["density"] == report.density


def test_a_combined_adapter_has_no_file(make_adapter: MakeAdapter) -> None:
    adapter = load_adapter(make_adapter())
    alone, combined = inspect_adapter(adapter), inspect_adapter(CombinedAdapter([adapter]))
    assert combined.size_bytes is None and combined.bytes_per_delta is None and combined.method == "merge_sum"
    assert (combined.indices_sha256, combined.values_sha256) == (alone.indices_sha256, alone.values_sha256)


def test_the_same_numbers_in_another_encoding(tmp_path: Path, adapter_config: AdapterConfig, deltas: Deltas) -> None:
    for encoding in ("plain", "delta"):
        save_adapter(tmp_path / encoding, as_items(deltas), config=adapter_config, index_encoding=encoding)  # type: ignore[arg-type]
    plain, short = (inspect_adapter(load_adapter(tmp_path / encoding)) for encoding in ("plain", "delta"))
    assert (plain.indices_sha256, plain.values_sha256) == (short.indices_sha256, short.values_sha256)
    assert plain.size_bytes > short.size_bytes and plain.modules == short.modules
