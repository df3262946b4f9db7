"""Finding, reading and overriding configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparse_ds.config import RunConfig, UserError, find_config, load_config, parse_config
from sparse_ds.config.load import CONFIGS_DIR

VALID: dict[str, Any] = {"optimizer": {"learning_rate": 0.001}, "train": {"output_dir": "runs/x"}}


def write(path: Path, data: dict[str, Any]) -> Path:
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "name", ["zero3_sft_ma.json", "zero3_sft_ma", "llama2_7b/sft_ma_nf4", "llama2_7b/sft_ma_bf16.json"]
)
def test_a_name_is_found_from_any_working_directory(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = find_config(name)
    assert found.is_file()
    assert found == CONFIGS_DIR / f"{name.removesuffix('.json')}.json"


def test_a_path_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "zero3_sft_ma.json", VALID)
    assert find_config("zero3_sft_ma.json") == Path("zero3_sft_ma.json")
    assert load_config("zero3_sft_ma.json").train.output_dir == "runs/x"


def test_a_folder_with_the_name_does_not_hide_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero3_sft_ma").mkdir()
    assert find_config("zero3_sft_ma") == CONFIGS_DIR / "zero3_sft_ma.json"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("zero3_sftma", r"zero3_sftma is no file, .* Did you mean zero3_sft_ma\.json"),
        ("llama2_7b/sft_ma_fp4", r"Did you mean .*llama2_7b/sft_ma_nf4\.json"),
        ("qqqqqqqqq", r"qqqqqqqqq is no file, expected a path or a name in .*configs\. There is: .*zero3_full\.json"),
        ("", r"--config: got an empty name"),
        (".", r"\. is a folder, expected a path or a name"),
    ],
)
def test_an_unknown_name_lists_what_there_is(name: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        find_config(name)


def test_the_result_does_not_depend_on_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "c.json", {**VALID, "data": {"train": "données/größe.jsonl"}})
    before = load_config(path)
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("PYTHONUTF8", "0")
    for name in ("TRAIN__SEED", "SEED", "OUTPUT_DIR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.setenv(name, "7")
    assert load_config(path) == before
    assert before.data.train == "données/größe.jsonl"


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(VALID).encode())
    assert load_config(path).optimizer.learning_rate == 0.001


def test_relative_paths_stay_relative(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "c.json", {**VALID, "data": {"train": "data/a.jsonl"}}))
    assert (config.train.output_dir, config.data.train) == ("runs/x", "data/a.jsonl")


@pytest.mark.parametrize(
    ("override", "section", "key", "expected"),
    [
        ("train.max_steps=7", "train", "max_steps", 7),
        ("train.max_steps=null", "train", "max_steps", None),
        ("optimizer.learning_rate=1e-4", "optimizer", "learning_rate", 1e-4),
        ("optimizer.learning_rate=1", "optimizer", "learning_rate", 1.0),
        ("train.overwrite=true", "train", "overwrite", True),
        ("method.target_modules=all-linear", "method", "target_modules", "all-linear"),
        ('method.target_modules=["q_proj","v_proj"]', "method", "target_modules", ["q_proj", "v_proj"]),
        ("data.train=a=b.jsonl", "data", "train", "a=b.jsonl"),
        ("data.eval=null", "data", "eval", None),
        ('data.train="x y.jsonl"', "data", "train", "x y.jsonl"),
        (" train.seed = 3 ", "train", "seed", 3),
        # All that is text stays text, whatever JSON would make of it.
        ("train.output_dir=2024", "train", "output_dir", "2024"),
        ("model.revision=1234567", "model", "revision", "1234567"),
        ("model.revision=12e4567", "model", "revision", "12e4567"),
        ("model.revision=null", "model", "revision", None),
        ("checkpoint.resume=true", "checkpoint", "resume", "true"),
    ],
)
def test_an_override_is_json_else_text(override: str, section: str, key: str, expected: object) -> None:
    value = getattr(getattr(parse_config(VALID, [override]), section), key)
    assert value == expected
    assert type(value) is type(expected)


def test_the_later_override_wins() -> None:
    assert parse_config(VALID, ["train.seed=1", "train.seed=2"]).train.seed == 2


def test_deep_keys_reach_into_the_deepspeed_section() -> None:
    config = parse_config(
        {**VALID, "deepspeed": {"zero_optimization": {"overlap_comm": False}}},
        ["deepspeed.zero_optimization.offload_param.device=cpu", "deepspeed.wall_clock_breakdown=true"],
    )
    assert config.deepspeed == {
        "zero_optimization": {"overlap_comm": False, "offload_param": {"device": "cpu"}},
        "wall_clock_breakdown": True,
    }


def test_an_override_through_a_value_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"--set: got deepspeed\.steps_per_print\.x, but deepspeed\.steps_per_print is 5"
    ):
        parse_config({**VALID, "deepspeed": {"steps_per_print": 5}}, ["deepspeed.steps_per_print.x=1"])


def test_an_override_displaces_the_alternative_of_the_file() -> None:
    data = {**VALID, "train": {"output_dir": "x", "global_batch_size": 32, "max_steps": 10}}
    by_steps = parse_config(data, ["train.gradient_accumulation_steps=3"]).train
    assert (by_steps.global_batch_size, by_steps.gradient_accumulation_steps) == (None, 3)
    by_epochs = parse_config(data, ["train.num_epochs=2"]).train
    assert (by_epochs.max_steps, by_epochs.num_epochs) == (None, 2.0)
    data["train"] = {"output_dir": "x", "gradient_accumulation_steps": 4, "num_epochs": 2}
    by_global = parse_config(data, ["train.global_batch_size=6", "train.max_steps=3"]).train
    assert (by_global.global_batch_size, by_global.gradient_accumulation_steps) == (6, None)
    assert by_global.max_steps == 3
    # Turned off by null, the file's alternative stays.
    assert parse_config(data, ["train.global_batch_size=null"]).train.gradient_accumulation_steps == 4


def test_another_method_displaces_the_settings_of_the_method_in_the_file() -> None:
    full = load_config("zero3_sft_ma", ["method.name=full", "model.quantization=none"])
    assert full.method.name == "full"
    assert "density" not in full.method.model_fields_set


@pytest.mark.parametrize("overrides", [[], ["method.name=full", "model.quantization=none"], ["train.num_epochs=2"]])
def test_a_resolved_configuration_loads_again(overrides: list[str], tmp_path: Path) -> None:
    config = load_config("zero3_sft_ma", overrides)
    path = write(tmp_path / "resolved_config.json", {**config.to_dict(), "versions": {"torch": "2.13.0"}})
    again = load_config(path)
    assert again.to_dict() == config.to_dict()
    assert {name: getattr(again, name) for name in RunConfig.model_fields} == {
        name: getattr(config, name) for name in RunConfig.model_fields
    }
