"""Every mistake gets a UserError that names the field, what was given and what is expected."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sparse_ds.config import UserError, load_config, parse_config
from sparse_ds.config.schema import RunConfig

VALID: dict[str, Any] = {"optimizer": {"learning_rate": 0.001}, "train": {"output_dir": "runs/x"}}

# section.key=value -> the message
BAD_OVERRIDES = [
    ("train.micro_batch_size=-1", r"train\.micro_batch_size: got -1 \(integer\), expected an integer >= 1\."),
    ("train.micro_batch_size=2.5", r"train\.micro_batch_size: got 2\.5 \(number\), expected an integer >= 1\."),
    ("train.micro_batch_size=two", r'train\.micro_batch_size: got "two" \(text\), expected an integer >= 1\.'),
    ("train.micro_batch_size=null", r"train\.micro_batch_size: got null, expected an integer >= 1\."),
    ("train.overwrite=1", r"train\.overwrite: got 1 \(integer\), expected true or false\."),
    ("train.seed=4294967296", r"train\.seed: got 4294967296 \(integer\), expected an integer >= 0 and < 4294967296\."),
    ("train.device=tpu", r'train\.device: got "tpu" \(text\), expected one of auto, cpu, cuda\.'),
    (
        "train.values_gradient=fast",
        r'train\.values_gradient: got "fast" \(text\), expected one of auto, sampled',
    ),
    (
        "train.values_gradient_crossover=2",
        r"train\.values_gradient_crossover: got 2 \(integer\), expected a number > 0",
    ),
    ('train.values_gradient_crossover={"4096": 0.1}', r"train\.values_gradient_crossover: got \{\"4096\": 0\.1\}"),
    ("train.max_steps=0", r"train\.max_steps: got 0 \(integer\), expected an integer >= 1 or null\."),
    ("train.num_epochs=0", r"train\.num_epochs: got 0 \(integer\), expected a number > 0\."),
    ("train.output_dir=", r'train\.output_dir: got "" \(text\), expected text that is not empty\.'),
    ("data.cache_dir=~/tokens", r"data\.cache_dir: got ~/tokens, expected a path written out: ~ is not expanded"),
    ("train.output_dir=~/runs", r"train\.output_dir: got ~/runs, expected a path written out: ~ is not expanded"),
    ("train.batch_size=8", r"train\.batch_size: unknown key; did you mean train\.\w*batch_size\?"),
    ("train.density=0.1", r"train\.density: unknown key; did you mean method\.density\?"),
    ("train.seed.first=1", r"train\.seed: got \{\"first\": 1\} \(section\), expected an integer"),
    ("trian.seed=1", r"trian: unknown section; did you mean train\? The sections are model, data, method"),
    ("learning_rate.value=1", r"learning_rate: unknown section; did you mean optimizer\.learning_rate\?"),
    ("method.density=0", r"method\.density: got 0 \(integer\), expected a number > 0 and <= 1\."),
    ("method.density=1.5", r"method\.density: got 1\.5 \(number\), expected a number > 0 and <= 1\."),
    ("method.sparsity=0.5", r"method\.sparsity: unknown key; did you mean method\.density\?"),
    ("method.zzz=0.5", r"method\.zzz: unknown key\. The keys of method are name, density, target_modules"),
    (
        "method.name=sft_mb",
        r'method\.name: got "sft_mb" \(text\), expected one of accumulated_gradient, fisher, sft_ag, sft_ma, '
        r"sparta, full\.",
    ),
    (
        "method.target_modules=[]",
        r"method\.target_modules: got \[\] \(list\), expected a list of texts or \"all-linear\"\.",
    ),
    ("method.target_modules=q_proj", r'method\.target_modules: got "q_proj" \(text\), expected a list of texts'),
    ("method.interval_steps=5", r"method\.interval_steps: got 5, expected more than method\.estimation_steps \(5\)"),
    (
        "method.initial_drop_fraction=20",
        r"method\.initial_drop_fraction: got 20 \(integer\), expected a number > 0 and",
    ),
    (
        "method.drop_schedule=sine",
        r'method\.drop_schedule: got "sine" \(text\), expected one of linear, cosine, constant\.',
    ),
    ("method.drop_criterion=age", r'method\.drop_criterion: got "age" \(text\), expected one of magnitude, change\.'),
    (
        "method.redistribution_factor=1",
        r"method\.redistribution_factor: got 1 \(integer\), expected a number > 1 or null\.",
    ),
    (
        "method.candidate_source=batch",
        r'method\.candidate_source: got "batch" \(text\), expected one of micro_batch, step\.',
    ),
    ("method.gradient_tile_mib=0", r"method\.gradient_tile_mib: got 0 \(integer\), expected an integer >= 1\."),
    ("method.gradient_tile_mib=0.5", r"method\.gradient_tile_mib: got 0\.5 \(number\), expected an integer >= 1\."),
    (
        "method.gradient_accumulator_limit_gib=0",
        r"method\.gradient_accumulator_limit_gib: got 0 \(integer\), expected a number > 0\.",
    ),
    (
        "method.random_growth_fraction=1.1",
        r"method\.random_growth_fraction: got 1\.1 \(number\), expected a number >= 0 and <= 1\.",
    ),
    (
        "method.block_size=0",
        r"method\.block_size: got 0 \(integer\), expected an integer >= 1 or a list of 2 numbers, each >= 1\. What is",
    ),
    ("method.block_size=[0,16]", r"method\.block_size: got \[0, 16\] \(list\), expected an integer >= 1 or a list"),
    ("method.block_size=[16]", r"method\.block_size: got \[16\] \(list\), expected an integer >= 1 or a list of 2"),
    ("method.block_size=16x16", r'method\.block_size: got "16x16" \(text\), expected an integer >= 1 or a list of 2'),
    ("method.train_biases=1", r"method\.train_biases: got 1 \(integer\), expected true or false\."),
    ("method.train_norms=yes", r'method\.train_norms: got "yes" \(text\), expected true or false\.'),
    ("method.sampling=normal", r'method\.sampling: got "normal" \(text\), expected one of exact, bernoulli\.'),
    (
        "optimizer.moments=int4",
        r'optimizer\.moments: got "int4" \(text\), expected one of float32, bfloat16, int8\.',
    ),
    ("optimizer.momentum=1", r"optimizer\.momentum: got 1 \(integer\), expected a number >= 0 and < 1\."),
    ("optimizer.learning_rate=-1", r"optimizer\.learning_rate: got -1 \(integer\), expected a number > 0\."),
    (
        "optimizer.betas=[0.9]",
        r"optimizer\.betas: got \[0\.9\] \(list\), expected a list of 2 numbers, each >= 0 and < 1\.",
    ),
    (
        "optimizer.betas=[0.9,0.99]",
        r"optimizer\.betas: given, but method\.name sft_ma does not use it\. Remove it, or choose a method that does "
        r"\(accumulated_gradient, fisher, sft_ag, sparta, full\)\.",
    ),
    (
        "optimizer.max_grad_norm=false",
        r"optimizer\.max_grad_norm: got false \(true or false\), expected a number >= 0\.",
    ),
    ("model.quantization=int8", r'model\.quantization: got "int8" \(text\), expected one of nf4, none\.'),
    ("model.dtype=fp16", r'model\.dtype: got "fp16" \(text\), expected one of bfloat16, float32\.'),
    (
        "data.sequence_length=1",
        r"data\.sequence_length: got 1 \(integer\), expected an integer >= 2\. The longest sample",
    ),
    (
        "export.max_shard_size=5 gigabytes",
        r'export\.max_shard_size: got "5 gigabytes" \(text\), expected text like 5GB',
    ),
    ('monitor.report_to=["tensorbord"]', r"monitor\.report_to: got .* expected a list of names out of azure_ml"),
    ("checkpoint.keep=0", r"checkpoint\.keep: got 0 \(integer\), expected an integer >= 1\."),
    ("deepspeed=1", r"--set: got 'deepspeed=1', expected section\.key=value"),
    ("train.max_steps", r"--set: got 'train\.max_steps', expected section\.key=value"),
    ("train..seed=1", r"--set: got 'train\.\.seed=1', expected section\.key=value"),
]

CONFLICTS = [
    (
        ["method.name=sparta", "method.train_norms=true", 'export.adapters=["shira"]'],
        r"export\.adapters: got \['shira'\], but PEFT's formats hold no deltas of biases .*method\.train_norms",
    ),
    (
        ["method.name=full", "model.quantization=none", "export.verify=true"],
        r"export\.verify: given, but method\.name full does not use it",
    ),
    (
        ["model.attention=flash_attention_2", "model.dtype=float32"],
        r"model\.attention: got flash_attention_2, .* 16 bits",
    ),
    (
        ["model.attention=flash_attention_2", "train.device=cpu"],
        r"model\.attention: got flash_attention_2, .* needs a GPU",
    ),
    (["train.max_steps=10", "train.num_epochs=2"], r"train\.num_epochs: got 2\.0 together with train\.max_steps 10"),
    (
        ["train.global_batch_size=10", "train.micro_batch_size=4"],
        r"train\.global_batch_size: got 10, expected a multiple",
    ),
    (
        ["train.global_batch_size=8", "train.gradient_accumulation_steps=3"],
        r"train\.global_batch_size: got 8, expected a multiple of train\.micro_batch_size \(1\) x "
        r"train\.gradient_accumulation_steps \(3\)",
    ),
    (["train.overwrite=true", "checkpoint.resume=auto"], r"train\.overwrite: got true .* checkpoint\.resume auto"),
    (
        ["checkpoint.best=true"],
        r"checkpoint\.best: got true, but train\.eval_interval_steps and checkpoint\.interval_steps is null",
    ),
    (
        ["checkpoint.best=true", "data.eval=null", "checkpoint.interval_steps=5", "train.eval_interval_steps=5"],
        r"checkpoint\.best: got true, but data\.eval is null",
    ),
    (
        ["checkpoint.best=true", "checkpoint.interval_steps=5", "train.eval_interval_steps=2"],
        r"checkpoint\.interval_steps: got 5, expected with checkpoint\.best a multiple of train\.eval_interval_st",
    ),
    (["method.name=full"], r"model\.quantization: got nf4, expected none with method\.name full"),
    (
        ["method.name=full", "model.quantization=none", "method.density=0.1"],
        r"method\.density: given, but method\.name full does not use it",
    ),
    (
        ["method.name=sft_ag", "method.interval_steps=5", "method.estimation_steps=5"],
        r"method\.interval_steps: got 5, expected more than method\.estimation_steps \(5\): the estimation before",
    ),
    (
        ["method.name=sparta", "method.estimation_steps=5"],
        r"method\.estimation_steps: given, but method\.name sparta does not use it",
    ),
    (
        ["method.name=full", "model.quantization=none", "optimizer.momentum=0.5"],
        r"optimizer\.momentum: given, but method\.name full does not use it",
    ),
    (
        ["train.early_stopping_patience=2"],
        r"train\.early_stopping_patience: got 2, but train\.eval_interval_steps is null",
    ),
]

BAD_FILES = [
    (b'{"train": {', r"config\.json: line 1, column 12: no valid JSON"),
    (b'{\n  "train": {"seed": 1,}\n}', r"config\.json: line 2, column 23: no valid JSON"),
    (b'{"train": {"seed": 1, "seed": 2}}', r"config\.json: no valid JSON: the key seed is given twice"),
    (b'{"optimizer": {"learning_rate": NaN}}', r"config\.json: no valid JSON: NaN is no JSON number"),
    (
        b'{"optimizer": {"learning_rate": 1e999}}',
        r"optimizer\.learning_rate: got Infinity \(number\), expected a number > 0",
    ),
    (b'{"train": "\xff"}', r"config\.json: byte 11 is not UTF-8"),
    (b"[1, 2]", r"config\.json: got \[1, 2\] \(list\), expected an object with sections"),
    (b"", r"config\.json: line 1, column 1: no valid JSON"),
    (b'{"a": ' + b"[" * 100_000, r"config\.json: no valid JSON"),
    (b"{}", r"optimizer: missing, expected a section"),
    (b'{"train": 5, "optimizer": {"learning_rate": 1}}', r"train: got 5 \(integer\), expected a section"),
    (
        b'{"train": {}, "optimizer": {"learning_rate": 1}}',
        r"train\.output_dir: missing, expected text that is not empty",
    ),
]


def message_of(data: dict[str, Any], overrides: list[str]) -> str:
    with pytest.raises(UserError) as raised:
        parse_config(data, overrides)
    return str(raised.value)


def test_the_valid_base_of_this_table_is_valid() -> None:
    assert isinstance(parse_config(VALID), RunConfig)


@pytest.mark.parametrize(("override", "expected"), BAD_OVERRIDES, ids=[override for override, _ in BAD_OVERRIDES])
def test_a_bad_override_is_explained(override: str, expected: str) -> None:
    assert re.search(expected, message_of(VALID, [override]))


@pytest.mark.parametrize(("overrides", "expected"), CONFLICTS, ids=[" ".join(overrides) for overrides, _ in CONFLICTS])
def test_a_conflict_is_explained(overrides: list[str], expected: str) -> None:
    assert re.search(expected, message_of(VALID, overrides))


@pytest.mark.parametrize(("content", "expected"), BAD_FILES, ids=[str(content[:40]) for content, _ in BAD_FILES])
def test_a_bad_file_is_explained(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=expected) as raised:
        load_config(path)
    assert str(path) in str(raised.value)


def test_all_problems_come_in_one_message() -> None:
    message = message_of(
        {
            "optimizer": {"learning_rate": "fast", "momentum": 2},
            "train": {"output_dir": "x", "max_steps": 5, "num_epochs": 2},
            "method": {"interval_steps": 3},
            "dat": {},
            "deepspeed": {"gradient_cliping": 5, "zero_optimization": {"stage": 1}},
        },
        [],
    )
    lines = message.splitlines()
    assert lines[0] == "configuration: 7 problems:"
    for field in (
        "optimizer.learning_rate",
        "optimizer.momentum",
        "train.num_epochs",
        "method.interval_steps",
        "dat",
        "deepspeed.gradient_cliping",
        "deepspeed.zero_optimization.stage",
    ):
        assert sum(line.startswith(f"  {field}:") for line in lines) == 1, field
    assert len(lines) == 8


def test_a_problem_from_the_command_line_says_so() -> None:
    assert message_of(VALID, ["train.seed=-1"]).endswith("(from --set)")
    assert "--set" not in message_of({**VALID, "model": {"dtype": "fp8"}}, [])


def test_a_value_of_any_length_is_cut_in_the_message() -> None:
    assert len(message_of({**VALID, "model": {"dtype": "x" * 10_000}}, [])) < 500


@pytest.mark.parametrize("overrides", [[], ["train.seed=1"]])
def test_the_caller_keeps_its_data(overrides: list[str]) -> None:
    data = json.loads(json.dumps(VALID))
    parse_config(data, overrides)
    assert data == VALID
