"""A base saved in NF4: what transformers itself saves, and loads; training and merging see the same weights."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_items import MakeAdapter, MakeBase
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sparse_ds.cli import main
from sparse_ds.config.errors import UserError
from sparse_ds.export.merged import merge_adapter
from sparse_ds.export.quantized import write_nf4_checkpoint
from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.model.stored_nf4 import STATE

TOKENS = torch.arange(12).view(2, 6)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """bitsandbytes' offset of double quantization depends on the number of threads."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def logging_as_it_was() -> Iterator[None]:
    """The command sets up logging for a process of its own."""
    ours = logging.getLogger("sparse_ds")
    before = ours.handlers, ours.propagate, ours.level
    yield
    ours.handlers, ours.propagate, ours.level = before


def quantized_by_transformers(base: Path, double_quantization: bool) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quantization,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=config)


def all_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("double_quantization", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_it_is_what_transformers_saves_and_loads(
    make_base: MakeBase, tmp_path: Path, double_quantization: bool, tied: bool
) -> None:
    # More than 256 blocks of 64 in a matrix: more than one group of scales.
    base = make_base(tied=tied, hidden_size=128, intermediate_size=192)
    ours = tmp_path / "ours"
    write_nf4_checkpoint(base, ours, double_quantization=double_quantization, max_shard_size="100KB")
    expected_model = quantized_by_transformers(base, double_quantization)
    expected_model.save_pretrained(tmp_path / "theirs")
    found, expected = all_tensors(ours), all_tensors(tmp_path / "theirs")
    assert found.keys() == expected.keys() and len(list(ours.glob("*.safetensors"))) > 1
    for name, tensor in expected.items():
        if name.endswith(STATE):
            states = [json.loads(bytes(state.tolist())) for state in (found[name], tensor)]
            assert states[0] == states[1], name
        else:
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    loaded = AutoModelForCausalLM.from_pretrained(ours)
    assert loaded.config.quantization_config.bnb_4bit_use_double_quant is double_quantization
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, expected_model(TOKENS).logits)


@pytest.mark.parametrize("double_quantization", [False, True])
def test_a_merge_into_it_is_a_merge_into_the_original(
    make_base: MakeBase, make_adapter: MakeAdapter, tmp_path: Path, double_quantization: bool
) -> None:
    base = make_base()
    adapter = make_adapter(quantization="nf4", double_quantization=double_quantization)
    write_nf4_checkpoint(base, tmp_path / "nf4", double_quantization=double_quantization)
    for name in ("original", "nf4"):
        merge_adapter(base if name == "original" else tmp_path / "nf4", adapter, tmp_path / f"merged_{name}")
    original, of_nf4 = (all_tensors(tmp_path / f"merged_{name}") for name in ("original", "nf4"))
    assert original.keys() == of_nf4.keys()
    targets = [name for name in original if "q_proj" in name or "down_proj" in name]
    trained = [name for name in targets if name in ("model.layers.0.self_attn.q_proj.weight",)]
    assert trained and all(torch.equal(original[name], of_nf4[name]) for name in trained)
    # What the adapter does not train is in NF4 in this base, and stays dequantized.
    config = json.loads((tmp_path / "merged_nf4" / "config.json").read_text())
    assert "quantization_config" not in config
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged_nf4")


@pytest.mark.usefixtures("logging_as_it_was")
def test_the_command(make_base: MakeBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_base()
    assert main(["quantize", str(base), str(tmp_path / "nf4"), "--double-quantization", "--device", "cpu"]) == 0
    assert "nf4: 0.00 GiB in 1 file(s)" in capsys.readouterr().out
    assert BaseCheckpoint(tmp_path / "nf4").config["quantization_config"]["bnb_4bit_use_double_quant"] is True
    assert main(["quantize", str(tmp_path / "nf4"), str(tmp_path / "again"), "--device", "cpu"]) == 2
    assert "is in NF4 already; give a 16-bit checkpoint" in capsys.readouterr().err
    assert main(["quantize", str(base), str(base), "--device", "cpu", "--overwrite"]) == 2
    assert "which is being read" in capsys.readouterr().err
    assert main(["quantize", str(base), str(tmp_path / "nf4"), "--device", "cpu"]) == 2
    assert "already exists and is not empty" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_nan_in_the_base_leaves_nothing(make_base: MakeBase, tmp_path: Path, name: str) -> None:
    base = make_base()
    tensors = load_file(base / "model.safetensors")
    tensors[name].view(-1)[0] = math.nan
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"Tensor '{name}' of base .* holds NaN or Inf"):
        write_nf4_checkpoint(base, tmp_path / "nf4")
    assert os.listdir(tmp_path) == [base.name]


def test_a_file_that_cannot_grow_leaves_nothing(make_base: MakeBase, tmp_path: Path) -> None:
    """A real limit of the system on the size of files, in a process of its own."""
    base = make_base(hidden_size=128, intermediate_size=192)
    program = (
        "import resource, signal, sys; from sparse_ds.cli import main; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY)); "
        f"sys.exit(main(['quantize', {str(base)!r}, {str(tmp_path / 'nf4')!r}, '--device', 'cpu']))"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2, ended.stderr
    assert "Could not write the model to" in ended.stderr and "Nothing was left there" in ended.stderr
    assert os.listdir(tmp_path) == [base.name]
