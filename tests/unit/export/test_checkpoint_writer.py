"""Folders are laid out as transformers lays them out, and a failure leaves none."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_items import MakeBase
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from sparse_ds.checkpoint.tensor_file import TensorFile
from sparse_ds.config.errors import UserError
from sparse_ds.export import checkpoint_writer
from sparse_ds.export.checkpoint_writer import plan_shards, write_checkpoint


@pytest.fixture
def base(make_base: MakeBase) -> Path:
    return make_base()


def write(base: Path, output: Path, tensors: dict[str, torch.Tensor] | None = None, **options: Any) -> Any:
    if tensors is None:
        tensors = load_file(base / "model.safetensors")
    return write_checkpoint(
        output, tensors, tensors.__getitem__, base_folder=base, tokenizer_folder=base, model_card="# card\n", **options
    )


@pytest.mark.parametrize("max_shard_size", ["5GB", "10KB"])
def test_files_are_those_of_save_pretrained(make_base: MakeBase, tmp_path: Path, max_shard_size: str) -> None:
    base = make_base(num_hidden_layers=11)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_size)
    written = write(base, tmp_path / "ours", dict(model.named_parameters()), max_shard_size=max_shard_size)

    theirs = sorted((tmp_path / "theirs").glob("model*"))
    assert [path.name for path in theirs] == sorted(path.name for path in (tmp_path / "ours").glob("model*"))
    assert written.num_shards == max(1, len(theirs) - 1)
    for path in theirs:
        assert path.read_bytes() == (tmp_path / "ours" / path.name).read_bytes(), path.name
    assert written.num_weights == model.num_parameters()
    assert written.size_bytes == 2 * model.num_parameters()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_of_weights_and_config(base: Path, tmp_path: Path, dtype: str) -> None:
    write(base, tmp_path / "out", dtype=dtype)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(base / "model.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(tensor, original[name].to(getattr(torch, dtype)))
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == getattr(torch, dtype)


def test_tokenizer_chat_template_and_generation_config_come_along(base: Path, tmp_path: Path) -> None:
    (base / "generation_config.json").write_text('{"max_new_tokens": 7}')
    write(base, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a b"}], tokenize=False) == "a b"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.max_new_tokens == 7
    assert (tmp_path / "out" / "README.md").read_text() == "# card\n"


def test_tensors_are_asked_for_in_the_planned_order(base: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    asked = []

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return tensors[name]

    # 1.5 KB is less than some tensors and more than others, so the plan does not follow the order of the names.
    write_checkpoint(
        tmp_path / "out",
        tensors,
        read,
        base_folder=base,
        tokenizer_folder=base,
        model_card="",
        max_shard_size="1.5KB",
    )
    plan = plan_shards(tensors, dtype="bfloat16", max_shard_size="1.5KB")
    assert asked == [name for names in plan.values() for name in names]
    assert sorted(asked) == sorted(tensors) and asked != sorted(tensors)


@pytest.mark.parametrize("failing_shard", [1, 2])
def test_full_disk_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_shard: int
) -> None:
    num_files = 0

    class FullDisk(TensorFile):
        def __init__(self, *args: Any) -> None:
            nonlocal num_files
            num_files += 1
            super().__init__(*args)

        def write(self, name: str, tensor: torch.Tensor) -> None:
            if num_files == failing_shard:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            super().write(name, tensor)

    monkeypatch.setattr(checkpoint_writer, "TensorFile", FullDisk)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(RuntimeError, match=r"Could not write the model to '.*out': .*No space left on device"):
        write(base, tmp_path / "out", max_shard_size="10KB")
    assert num_files == failing_shard
    assert sorted(os.listdir(tmp_path)) == before


def test_too_little_room_is_found_before_writing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(os.listdir(tmp_path))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(checkpoint_writer, "TensorFile", lambda *args, **kwargs: pytest.fail("wrote"))
    with pytest.raises(RuntimeError, match=r"Not enough room for '.*out': it needs 0\.00 GiB"):
        write(base, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == before


def test_a_number_too_large_for_float16_is_refused(base: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e5
    with pytest.raises(UserError, match=r"Tensor 'model\.norm\.weight' holds 1e\+05, too large for float16"):
        write(base, tmp_path / "out", tensors, dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "export.merged_dtype is 'int8'; expected one of bfloat16, float16, float32"),
        (
            {"max_shard_size": "5 gigs"},
            "export.max_shard_size is '5 gigs'; expected a number with a unit such as '5GB'",
        ),
    ],
)
def test_bad_options(base: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        write(base, tmp_path / "out", **options)


def test_folder_without_a_tokenizer(base: Path, tmp_path: Path) -> None:
    for path in base.glob("tokenizer*"):
        path.unlink()
    (base / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"holds no tokenizer; expected one of tokenizer\.json"):
        write(base, tmp_path / "out")
