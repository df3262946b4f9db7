"""SHiRA folders: what is written, what comes back, what PEFT itself writes, and its own kinds of damage."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_items import Deltas, MakeAdapter, MakeBase, as_items
from peft import PeftModel, ShiraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparse_ds.adapter.adapter import Adapter, AdapterConfig
from sparse_ds.adapter.native import load_adapter, save_adapter
from sparse_ds.adapter.peft_formats.shira import ShiraAdapter, save_shira
from sparse_ds.adapter.peft_formats.writing import PREFIX
from sparse_ds.config.errors import UserError
from sparse_ds.export.quantized import write_nf4_checkpoint

Q_PROJ, DOWN_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def assert_same(found: Adapter, expected: Adapter) -> None:
    assert found.config == AdapterConfig(
        **{name: getattr(expected.config, name) for name in AdapterConfig.model_fields}
    )
    for name, theirs in expected.items():
        for one, other in zip(found.read(name), theirs, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other), name


def test_the_files(tmp_path: Path, make_adapter: MakeAdapter, deltas: Deltas) -> None:
    native = load_adapter(make_adapter())
    report = save_shira(native, tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / CONFIG).read_text())
    assert (config["peft_type"], config["r"], config["mask_type"]) == ("SHIRA", 2, "sparse_ds")
    tensors = load_file(tmp_path / "peft" / WEIGHTS)
    for name, (num_rows, num_cols) in native.config.shapes.items():
        pairs, values = tensors[f"{PREFIX}{name}.shira_indices"], tensors[f"{PREFIX}{name}.shira_weight"]
        num_entries = 2 * (num_rows + num_cols)
        assert (pairs.dtype, list(pairs.shape)) == (torch.int32, [2, num_entries])
        assert (values.dtype, list(values.shape)) == (torch.float32, [num_entries])
        dense, expected = torch.zeros(num_rows, num_cols), torch.zeros(num_rows * num_cols)
        dense.index_put_((pairs[0].long(), pairs[1].long()), values, accumulate=True)
        expected[deltas[name][0].long()] = deltas[name][1]
        assert torch.equal(dense.view(-1), expected)
    assert (report.num_deltas, report.num_padding) == (153, 2 * (48 + 64) - 153)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("num_active", [0, 1, 576])
def test_what_was_exported_comes_back(
    tmp_path: Path, make_adapter: MakeAdapter, deltas: Deltas, quantization: str, num_active: int
) -> None:
    deltas[Q_PROJ] = torch.arange(num_active, dtype=torch.int32), torch.zeros(num_active)
    native = load_adapter(make_adapter(quantization=quantization))
    assert save_shira(native, tmp_path / "peft").warnings == ()
    assert_same(ShiraAdapter(tmp_path / "peft"), native)


def test_a_matrix_of_2_to_the_31_weights(tmp_path: Path, adapter_config: AdapterConfig) -> None:
    """Rows and columns fit where flat positions do not."""
    config = adapter_config.model_copy(update={"shapes": {"head": (2**16, 2**15)}})
    save_adapter(tmp_path / "native", [("head", torch.tensor([0, 2**31 - 1]), torch.ones(2))], config=config)
    native = load_adapter(tmp_path / "native")
    save_shira(native, tmp_path / "peft")
    assert_same(ShiraAdapter(tmp_path / "peft"), native)


def test_one_r_for_all_matrices_has_its_limit(tmp_path: Path, adapter_config: AdapterConfig) -> None:
    shapes = {"wide": (64, 64), "narrow": (2, 64)}
    items: Deltas = {"wide": (torch.arange(300), torch.ones(300)), "narrow": (torch.arange(5), torch.ones(5))}
    save_adapter(tmp_path / "native", as_items(items), config=adapter_config.model_copy(update={"shapes": shapes}))
    with pytest.raises(
        UserError, match=r"one r for all .* here 3, and 'narrow' \[2, 64\] has room for at most 1\. Exp"
    ):
        save_shira(load_adapter(tmp_path / "native"), tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def train_with_peft(base: Path, folder: Path) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    tuned: PeftModel = get_peft_model(model, ShiraConfig(r=2, random_seed=1, init_weights=False, **settings))
    tuned.save_pretrained(folder)
    return tuned


@pytest.mark.parametrize("form", ["linux", "windows", "shuffled"])
def test_an_adapter_that_peft_made(make_base: MakeBase, tmp_path: Path, form: str) -> None:
    base = make_base()
    tuned = train_with_peft(base, tmp_path / "peft")
    tensors = load_file(tmp_path / "peft" / WEIGHTS)
    for name, tensor in tensors.items():
        if form == "windows" and "indices" in name:
            tensors[name] = tensor.float()
        elif form == "shuffled":
            tensors[name] = tensor.flip(-1).contiguous()
    save_file(tensors, tmp_path / "peft" / WEIGHTS)
    adapter = ShiraAdapter(tmp_path / "peft")
    assert (adapter.config.method, adapter.config.density) == ("shira", (96 + 128) / (576 + 960))
    assert adapter.config.base.quantization == "none"
    for name, (indices, values) in adapter.items():
        expected = tuned.get_submodule(f"{PREFIX}{name}").get_delta_weight("default").to_dense().detach()
        dense = torch.zeros(expected.numel())
        dense[indices.long()] = values
        assert torch.equal(dense.view_as(expected), expected) and indices.dtype == torch.int32
    save_shira(adapter, tmp_path / "again")
    assert_same(ShiraAdapter(tmp_path / "again"), adapter)


def test_over_a_base_that_is_stored_in_4_bits(make_base: MakeBase, tmp_path: Path) -> None:
    base = make_base()
    train_with_peft(base, tmp_path / "peft")
    write_nf4_checkpoint(base, tmp_path / "nf4", double_quantization=True)
    config = ShiraAdapter(tmp_path / "peft", tmp_path / "nf4").config
    assert (config.base.quantization, config.base.double_quantization, config.base.dtype) == ("nf4", True, "bfloat16")
    assert config.shapes[DOWN_PROJ] == (24, 40)


def _put(tensor: torch.Tensor, place: tuple[int, ...], value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


DAMAGES: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = {
    "row": ("indices", lambda one: _put(one, (0, 3), 24), r"shira_indices' holds row 24, expected row 0 to 23"),
    "column": ("indices", lambda one: _put(one, (1, 3), -2), r"shira_indices' holds column -2, expected column 0 to"),
    "half": ("indices", lambda one: _put(one.float(), (1, 3), 0.5), r"expected \[2, N\] whole numbers"),
    "nan": ("indices", lambda one: _put(one.float(), (1, 3), math.nan), r"expected \[2, N\] whole numbers"),
    "three rows": ("indices", lambda one: torch.cat([one, one[:1]]), r"shape \[3, 96\], expected \[2, N\]"),
    "flat": ("indices", lambda one: one.view(-1), r"torch\.int32 \[192\], expected int32 or int64 .* and 2 dimension"),
    "twice": ("indices", lambda one: torch.cat([one[:, :-1], one[:, :1]], 1), r"more than one value for a weight"),
    "not finite": (
        "weight",
        lambda one: _put(one, (3,), math.inf),
        r"shira_weight' holds 1 numbers that are NaN or inf",
    ),
    "too short": ("weight", lambda one: one[:-1], r"shira_weight' has 95 entries, its indices 96"),
}


def test_damages(make_base: MakeBase, tmp_path: Path) -> None:
    train_with_peft(make_base(), tmp_path / "peft")
    good = load_file(tmp_path / "peft" / WEIGHTS)
    for part, damage, message in DAMAGES.values():
        name = f"{PREFIX}{Q_PROJ}.shira_{part}"
        save_file({**good, name: damage(good[name]).contiguous()}, tmp_path / "peft" / WEIGHTS)
        with pytest.raises(UserError, match=rf"{WEIGHTS}': tensor '.*{message}"):
            ShiraAdapter(tmp_path / "peft")
