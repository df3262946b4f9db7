"""Adapters: what is saved comes back, and every kind of damage is named."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_items import Deltas, MakeAdapter, as_items
from safetensors.torch import load_file, save_file

from sparse_ds.adapter import native
from sparse_ds.adapter.adapter import AdapterConfig
from sparse_ds.adapter.native import CONFIG_FILE, WEIGHTS_FILE, load_adapter, save_adapter
from sparse_ds.config.errors import UserError
from sparse_ds.sparse.index_hash import hash_indices

Q_PROJ = "model.layers.0.self_attn.q_proj"


def test_round_trip(tmp_path: Path, adapter_config: AdapterConfig, deltas: Deltas) -> None:
    stored = save_adapter(tmp_path / "adapter", as_items(deltas), config=adapter_config)
    loaded = load_adapter(tmp_path / "adapter")
    assert loaded.config == stored
    assert loaded.config.index_hash == hash_indices((name, indices) for name, (indices, _) in deltas.items())
    assert adapter_config.model_dump().items() <= stored.model_dump().items()
    assert {name for name, _ in loaded.items()} == set(deltas)
    for name, (indices, values) in loaded.items():
        assert torch.equal(indices, deltas[name][0]) and indices.dtype == torch.int32
        assert torch.equal(values, deltas[name][1]) and values.dtype == torch.float32


def test_files_are_readable_without_this_project(tmp_path: Path, adapter_config: AdapterConfig, deltas: Deltas) -> None:
    save_adapter(tmp_path / "adapter", as_items(deltas), config=adapter_config)
    assert sorted(os.listdir(tmp_path / "adapter")) == [CONFIG_FILE, WEIGHTS_FILE]
    tensors = load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    assert set(tensors) == {f"{name}.{part}" for name in deltas for part in ("indices", "values")}
    content = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())
    assert content["format"] == "sparse_ds.adapter"
    assert content["base"] == {
        "name": "owner/tiny",
        "revision": None,
        "quantization": "none",
        "double_quantization": False,
        "dtype": "bfloat16",
        "weights_hash": None,
    }
    assert content["shapes"]["model.layers.1.mlp.down_proj"] == [24, 40]


def test_indices_of_about_one_byte(tmp_path: Path, adapter_config: AdapterConfig, deltas: Deltas) -> None:
    plain = save_adapter(tmp_path / "plain", as_items(deltas), config=adapter_config)
    stored = save_adapter(tmp_path / "short", as_items(deltas), config=adapter_config, index_encoding="delta")
    loaded = load_adapter(tmp_path / "short")
    assert loaded.stored == stored and stored.index_hash == plain.index_hash
    tensors = load_file(tmp_path / "short" / WEIGHTS_FILE)
    assert set(tensors) == {f"{name}.{part}" for name in deltas for part in ("index_gaps", "values")}
    for name, (indices, values) in loaded.items():
        assert tensors[f"{name}.index_gaps"].numel() == indices.numel()  # at 10 % density no gap needs two bytes
        assert torch.equal(indices, deltas[name][0]) and indices.dtype == torch.int32
        assert torch.equal(values, deltas[name][1])
    tensors[f"{Q_PROJ}.index_gaps"][-1] += 128
    save_file(tensors, tmp_path / "short" / WEIGHTS_FILE)
    with pytest.raises(UserError, match=r"tensor '.*q_proj\.index_gaps': the last gap is cut off"):
        load_adapter(tmp_path / "short")


def test_other_dtypes_are_brought_to_the_stored_ones(
    tmp_path: Path, adapter_config: AdapterConfig, deltas: Deltas
) -> None:
    items = [(name, indices.long(), values.double()) for name, (indices, values) in deltas.items()]
    save_adapter(tmp_path / "adapter", items, config=adapter_config)
    for name, (indices, values) in load_adapter(tmp_path / "adapter").items():
        assert torch.equal(indices, deltas[name][0]) and indices.dtype == torch.int32
        assert torch.equal(values, deltas[name][1])


def test_a_matrix_of_2_to_the_31_weights_gets_int64(tmp_path: Path, adapter_config: AdapterConfig) -> None:
    config = adapter_config.model_copy(update={"shapes": {"head": (2**16, 2**15)}})
    indices = torch.tensor([0, 2**31 - 1])
    save_adapter(tmp_path / "adapter", [("head", indices, torch.ones(2))], config=config)
    loaded = load_adapter(tmp_path / "adapter").read("head").indices
    assert torch.equal(loaded, indices) and loaded.dtype == torch.int64


def test_saving_again_needs_overwrite(tmp_path: Path, adapter_config: AdapterConfig, deltas: Deltas) -> None:
    save_adapter(tmp_path / "adapter", as_items(deltas), config=adapter_config)
    with pytest.raises(UserError, match="already exists"):
        save_adapter(tmp_path / "adapter", as_items(deltas), config=adapter_config)
    doubled = {name: (indices, values * 2) for name, (indices, values) in deltas.items()}
    save_adapter(tmp_path / "adapter", as_items(doubled), config=adapter_config, overwrite=True)
    assert torch.equal(load_adapter(tmp_path / "adapter").read(Q_PROJ).values, deltas[Q_PROJ][1] * 2)


@pytest.mark.parametrize("failing", ["weights", "config"])
def test_full_disk_leaves_nothing(
    tmp_path: Path, adapter_config: AdapterConfig, deltas: Deltas, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def disk_full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if failing == "weights":
        monkeypatch.setattr(native, "save_file", disk_full)
    else:
        monkeypatch.setattr(Path, "write_text", disk_full)
    with pytest.raises(RuntimeError, match=r"Could not write the adapter to .*No space left on device"):
        save_adapter(tmp_path / "adapter", as_items(deltas), config=adapter_config)
    assert os.listdir(tmp_path) == []


def test_all_deltas_are_read_before_a_mistake_is_reported(
    tmp_path: Path, adapter_config: AdapterConfig, deltas: Deltas
) -> None:
    read = []

    def items() -> Any:
        for name, (indices, values) in deltas.items():
            yield name, indices, torch.full_like(values, torch.nan)
            read.append(name)

    with pytest.raises(ValueError, match=r"cannot be saved: tensor .* are NaN or infinite"):
        save_adapter(tmp_path / "adapter", items(), config=adapter_config)
    assert read == list(deltas)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("names", [[], [Q_PROJ, "model.layers.1.mlp.down_proj", "model.layers.9.mlp.down_proj"]])
def test_modules_must_be_those_of_the_config(tmp_path: Path, adapter_config: AdapterConfig, names: list[str]) -> None:
    items = [(name, torch.tensor([0]), torch.ones(1)) for name in names]
    with pytest.raises(ValueError, match=r"cannot be saved: tensor 'model.layers.*' (is missing|belongs to no module)"):
        save_adapter(tmp_path / "adapter", items, config=adapter_config)


Tensors = dict[str, torch.Tensor]


def _set(tensors: Tensors, part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    name = f"{Q_PROJ}.{part}"
    tensors[name] = change(tensors[name].clone()).contiguous()


def _put(tensor: torch.Tensor, position: int, value: float) -> torch.Tensor:
    tensor[position] = value
    return tensor


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(f"{Q_PROJ}.values"), r"tensor '.*q_proj\.values' is missing \(1 of 4 are\)"),
        (lambda t: t.update(extra=torch.ones(1)), r"tensor 'extra' belongs to no module of 'adapter_config\.json'"),
        (
            lambda t: _set(t, "indices", torch.Tensor.long),
            r"q_proj\.indices' has dtype torch\.int64, expected torch\.int32",
        ),
        (lambda t: _set(t, "indices", torch.Tensor.float), r"q_proj\.indices' has dtype torch\.float32, expected"),
        (
            lambda t: _set(t, "values", torch.Tensor.half),
            r"q_proj\.values' has dtype torch\.float16, expected torch\.float32",
        ),
        (lambda t: _set(t, "values", lambda v: v[1:]), r"has shape \[57\] and .* has shape \[56\], expected one"),
        (lambda t: [_set(t, p, lambda v: v[None]) for p in ("indices", "values")], r"has shape \[1, 57\] and"),
        (
            lambda t: _set(t, "indices", lambda i: i.flip(0)),
            r"q_proj\.indices' is not in ascending order at position 1",
        ),
        (lambda t: _set(t, "indices", lambda i: _put(i, 3, int(i[2]))), r"q_proj\.indices' holds \d+ twice"),
        (
            lambda t: _set(t, "indices", lambda i: _put(i, -1, 576)),
            r"q_proj\.indices' holds 576, expected 0 to 575 for shape",
        ),
        (lambda t: _set(t, "indices", lambda i: _put(i, 0, -1)), r"q_proj\.indices' holds -1, expected 0 to 575"),
        (lambda t: _set(t, "values", lambda v: _put(v, 0, torch.nan)), r"q_proj\.values' holds 1 numbers that are NaN"),
        (lambda t: _set(t, "values", lambda v: _put(v, 0, torch.inf)), r"q_proj\.values' holds 1 numbers that are NaN"),
    ],
)
def test_damaged_tensors_are_named(
    make_adapter: MakeAdapter, damage: Callable[[Tensors], object], message: str
) -> None:
    path = make_adapter() / WEIGHTS_FILE
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    with pytest.raises(UserError, match=message) as caught:
        load_adapter(path.parent)
    assert str(path) in str(caught.value)


def test_indices_of_another_adapter_are_found_by_the_hash(make_adapter: MakeAdapter) -> None:
    path = make_adapter() / WEIGHTS_FILE
    tensors = load_file(path)
    all_indices = set(range(576)) - set(tensors[f"{Q_PROJ}.indices"].tolist())
    moved = [*tensors[f"{Q_PROJ}.indices"].tolist()[1:], all_indices.pop()]
    tensors[f"{Q_PROJ}.indices"] = torch.tensor(sorted(moved), dtype=torch.int32)
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"does not belong to its 'adapter_config\.json': the indices have the hash"):
        load_adapter(path.parent)


def test_truncated_file(make_adapter: MakeAdapter) -> None:
    path = make_adapter() / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors' is damaged"):
        load_adapter(path.parent)


@pytest.mark.parametrize("missing", [CONFIG_FILE, WEIGHTS_FILE])
def test_missing_file(make_adapter: MakeAdapter, missing: str) -> None:
    folder = make_adapter()
    (folder / missing).unlink()
    with pytest.raises(UserError, match=f"has no '{missing}'"):
        load_adapter(folder)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere' does not exist"):
        load_adapter(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "has format 'other', expected 'sparse_ds.adapter'"),
        ({"format": None, "peft_type": "LORA"}, "has format None, expected 'sparse_ds.adapter'"),
        ({"format_version": 2}, r"has format_version 2, this version of sparse_ds reads 1\. Use the sparse_ds that"),
        ({"density": 0}, "density: Input should be greater than 0"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"base": {"name": "x", "quantization": "int3", "dtype": "bfloat16"}}, r"base\.quantization: Input should be"),
        ({"shapes": {Q_PROJ: [24]}}, rf"shapes\.{Q_PROJ}\.1: Field required"),
        ({"shapes": {Q_PROJ: [24, 24]}}, r"tensor 'model\.layers\.1\.mlp\.down_proj\.indices' belongs to no module"),
    ],
)
def test_bad_config(make_adapter: MakeAdapter, change: dict[str, Any], message: str) -> None:
    path = make_adapter() / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        load_adapter(path.parent)


@pytest.mark.parametrize(("text", "message"), [("{", "is not readable JSON"), ("[]", "has format 'list'")])
def test_config_that_is_no_json_object(make_adapter: MakeAdapter, text: str, message: str) -> None:
    path = make_adapter() / CONFIG_FILE
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_adapter(path.parent)


def with_head(config: AdapterConfig) -> AdapterConfig:
    changes = {"dense_shapes": {"score.weight": (2, 24)}, "task": "sequence_classification", "labels": ("no", "yes")}
    return config.model_copy(update={**changes, "pad_token_id": 2})


def test_a_tensor_that_trained_as_a_whole(tmp_path: Path, adapter_config: AdapterConfig, deltas: Deltas) -> None:
    head = torch.randn(2, 24)
    config, dense = with_head(adapter_config), {"score.weight": head}
    save_adapter(tmp_path / "adapter", as_items(deltas), config=config, dense=dense)
    adapter = load_adapter(tmp_path / "adapter")
    assert torch.equal(adapter.read_dense("score.weight"), head)
    assert (adapter.config.task, adapter.config.labels) == ("sequence_classification", ("no", "yes"))
    assert {name for name, _ in adapter.items()} == set(deltas)
    with pytest.raises(ValueError, match=r"tensor 'score.weight' is missing"):
        save_adapter(tmp_path / "other", as_items(deltas), config=config)
    for wrong in (torch.zeros(3, 24), torch.full((2, 24), torch.nan)):
        with pytest.raises(ValueError, match=r"tensor 'score.weight' (has dtype|holds numbers)"):
            save_adapter(tmp_path / "other", as_items(deltas), config=config, dense={"score.weight": wrong})
