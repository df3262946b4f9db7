"""Whatever kind of adapter lies in a folder, it is found or named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from adapter_items import MakeAdapter, MakeBase
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from sparse_ds.adapter.native import NativeAdapter, load_adapter
from sparse_ds.adapter.opening import open_adapter
from sparse_ds.adapter.peft_formats.shira import ShiraAdapter, save_shira
from sparse_ds.adapter.peft_formats.supertuning import SupertuningAdapter, save_supertuning
from sparse_ds.config.errors import UserError


def test_every_kind(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    native = load_adapter(make_adapter())
    save_supertuning(native, tmp_path / "supertuning")
    save_shira(native, tmp_path / "run" / "adapter")
    for path, kind in (
        (native.folder, NativeAdapter),
        (tmp_path / "supertuning", SupertuningAdapter),
        (tmp_path / "run", ShiraAdapter),
        (str(tmp_path / "run" / "adapter"), ShiraAdapter),
    ):
        adapter = open_adapter(path)
        assert type(adapter) is kind and adapter.index_hash == native.index_hash


def test_another_kind_of_peft_adapter(make_base: MakeBase, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_base())
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(UserError, match=r"has peft_type 'LORA'; expected one of SUPERTUNING, SHIRA, .* Merge it with"):
        open_adapter(tmp_path / "lora")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not readable JSON"),
        ([], "has neither 'format' .* nor 'peft_type'"),
        ({"r": 3}, "has neither 'format' .* nor 'peft_type'"),
        ({"format": "other"}, "has format 'other', expected 'sparse_ds.adapter'"),
        ({"peft_type": "SHIRA", "r": 2}, "has no 'adapter_model.safetensors'"),
        ({"peft_type": "SUPERTUNING", "sparsity": 7}, r"cannot be read by PEFT \(ValueError: sparsity must be in"),
        ({"peft_type": ["SHIRA"]}, "has peft_type .'SHIRA'.; expected one of SUPERTUNING, SHIRA"),
    ],
)
def test_a_config_that_cannot_be_used(tmp_path: Path, content: Any, message: str) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "adapter_config.json").write_text(text)
    if isinstance(content, dict) and content.get("format"):
        (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(UserError, match=message):
        open_adapter(tmp_path)


def test_no_adapter_there(make_base: MakeBase, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no adapter: found .*config\.json, .*; expected 'adapter_config\.json'"):
        open_adapter(make_base())
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, message in (("empty", "found nothing"), ("file", "is a file"), ("missing", "does not exist")):
        with pytest.raises(UserError, match=message):
            open_adapter(tmp_path / name)
