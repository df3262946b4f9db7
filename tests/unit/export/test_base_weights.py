"""Merging into dequantized and original weights, the report on both, and bases that are not the one of the training."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from adapter_items import Deltas, MakeAdapter, MakeBase
from safetensors.torch import load_file, save_file

from sparse_ds.adapter.native import load_adapter
from sparse_ds.config.errors import UserError
from sparse_ds.export.merged import REPORT_FILE, merge_adapter
from sparse_ds.export.quantized import write_nf4_checkpoint

Q_PROJ, DOWN_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def test_original_weights_and_the_report(
    make_base: MakeBase, make_adapter: MakeAdapter, deltas: Deltas, tmp_path: Path
) -> None:
    base, folder = make_base(), make_adapter(quantization="nf4")
    reports = {}
    for base_weights in ("dequantized", "original"):
        merged = tmp_path / base_weights
        report = merge_adapter(base, folder, merged, base_weights=base_weights)
        reports[base_weights] = report
        written = json.loads((merged / REPORT_FILE).read_text())
        assert written["base_weights"] == base_weights and set(written["matrices"]) == set(deltas)
        weights, originals = load_file(merged / "model.safetensors"), load_file(base / "model.safetensors")
        for name, (indices, values) in deltas.items():
            original = originals[f"{name}.weight"].bfloat16()
            dequantized = bnb.dequantize_4bit(*bnb.quantize_4bit(original, blocksize=64, quant_type="nf4"))
            # The oracle: row and column of every delta, one at a time.
            expected = (dequantized if base_weights == "dequantized" else original).clone()
            for index, value in zip(indices.tolist(), values, strict=True):
                row, col = divmod(index, expected.shape[1])
                expected[row, col] = (expected[row, col].float() + value).bfloat16()
            assert torch.equal(weights[f"{name}.weight"], expected)
            error = (original.double() - dequantized.double()).square().sum().sqrt().item()
            found = written["matrices"][name]
            assert found["quantization_error_norm"] == pytest.approx(error, rel=1e-5)
            assert found["deltas_norm"] == pytest.approx(values.double().square().sum().sqrt().item(), rel=1e-6)
            assert found["error_dominates"] == (found["quantization_error_norm"] > found["deltas_norm"])
            assert found["num_deltas"] == indices.numel() and found["num_weights"] == original.numel()
    assert reports["original"].error is not None and "not the model that was trained" in reports["original"].error
    assert "is the one that was trained" in str(reports["dequantized"].error)
    card = (tmp_path / "original" / "README.md").read_text()
    assert "added to the original weights" in card and "dequantized ones" not in card


def test_without_quantization_there_is_no_error(make_base: MakeBase, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    report = merge_adapter(make_base(), make_adapter(), tmp_path / "merged")
    assert report.error is None
    assert all(each.quantization_error_norm is None for each in report.matrices.values())


def test_a_base_in_nf4_has_no_original(make_base: MakeBase, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    write_nf4_checkpoint(make_base(), tmp_path / "nf4")
    adapter = make_adapter(quantization="nf4")
    with pytest.raises(UserError, match=r"in NF4 \(2 matrices are\): it has no original weights"):
        merge_adapter(tmp_path / "nf4", adapter, tmp_path / "merged", base_weights="original")
    assert not (tmp_path / "merged").exists()


def test_a_base_with_other_weights(make_base: MakeBase, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    base, folder = make_base(), make_adapter(weights_hash="0" * 64)
    with pytest.raises(UserError, match=r"whose weights have the hash 0{64}; those of base .* have [0-9a-f]{64}") as e:
        merge_adapter(base, folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    merge_adapter(base, folder, tmp_path / "anyway", allow_other_base=True)

    path = folder / "adapter_config.json"
    content = json.loads(path.read_text())
    content["base"]["weights_hash"] = str(e.value).split(" have ")[2][:64]
    path.write_text(json.dumps(content))
    merge_adapter(base, load_adapter(folder), tmp_path / "merged")
    tensors = load_file(base / "model.safetensors")
    tensors[f"{DOWN_PROJ}.weight"] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="those of base"):
        merge_adapter(base, folder, tmp_path / "merged2")
