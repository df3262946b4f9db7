"""What is wrong before anything heavy is imported: the command line, the configuration, the launcher's variables.

One message on standard error, exit code 2, no traceback, and nothing is written. The same command in this process, not
in a new one: it ends before torch is needed, which the last test checks.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from forks import Ended, is_launcher_variable
from launches import ROOT, TRAIN
from short_run import set_words

from sparse_ds import cli

Run = Callable[..., Ended]
OUTPUT = ("--set", "train.output_dir=run")
RANK_0_OF_3 = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
RANK_0_OF_2 = {**RANK_0_OF_3, "WORLD_SIZE": "2"}


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs the command in this process, in an empty working folder, without the variables of any launcher."""

    def go_on(*arguments: object) -> None:
        pytest.fail("the mistake was not found before torch is needed")

    def run(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Ended:
        monkeypatch.setattr(cli, "_choose_device", go_on)
        monkeypatch.chdir(tmp_path)
        before = {name: value for name, value in os.environ.items() if not is_launcher_variable(name)}
        monkeypatch.setattr(os, "environ", before | dict(environment or {}))
        try:
            exit_code = cli.train(arguments)
        except SystemExit as end:
            exit_code = int(end.code or 0)
        return Ended(exit_code, *capfd.readouterr())

    return run


def assert_refused(ended: Ended, expected: str, folder: Path, *, files: Sequence[str] = ()) -> None:
    assert re.search(expected, ended.stderr), ended.stderr
    assert ended.exit_code == cli.USER_ERROR_EXIT_CODE
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("error:") == 1
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""
    assert sorted(entry.name for entry in folder.iterdir()) == sorted(files)


# arguments after `--config zero3_sft_ma --set train.output_dir=run` -> the message
BAD_SETTINGS = {
    "misspelt key": ("method.densty=0.1", r"method\.densty: unknown key; did you mean method\.density\? \(from"),
    "key of another section": ("train.density=0.1", r"train\.density: unknown key; did you mean method\.density\?"),
    "unknown section": ("optimiser.learning_rate=1", r"optimiser: unknown section; did you mean optimizer\?"),
    "wrong type": ("train.micro_batch_size=two", r'micro_batch_size: got "two" \(text\), expected an integer >= 1'),
    "number in quotes": ('train.max_steps="8"', r'train\.max_steps: got "8" \(text\), expected an integer'),
    "density above 1": ("method.density=1.5", r"method\.density: got 1\.5 \(number\), expected a number > 0 and <= 1"),
    "density 0": ("method.density=0", r"method\.density: got 0 \(integer\), expected a number > 0"),
    "negative rate": ("optimizer.learning_rate=-1", r"learning_rate: got -1 \(integer\), expected a number > 0"),
    "S = estimation steps": (
        "method.interval_steps=5",
        r"method\.interval_steps: got 5, expected more than method\.estimation_steps \(5\)",
    ),
    "other ZeRO stage": (
        "deepspeed.zero_optimization.stage=2",
        r"deepspeed\.zero_optimization\.stage: got 2 \(integer\), expected 3: only stage 3 partitions",
    ),
    "quantized weights": (
        "deepspeed.zero_optimization.zero_quantized_weights=true",
        r"zero_quantized_weights: got true .* expected false: it would change packed 4-bit weights",
    ),
    "batch in the DeepSpeed section": (
        "deepspeed.train_micro_batch_size_per_gpu=4",
        r"deepspeed\.train_micro_batch_size_per_gpu: cannot be set here: train owns it: set train\.micro_batch_size",
    ),
    "optimizer in the DeepSpeed section": (
        'deepspeed.optimizer={"type": "AdamW"}',
        r"deepspeed\.optimizer: cannot be set here: the section optimizer owns it",
    ),
    "misspelt DeepSpeed key": (
        "deepspeed.gradient_cliping=5",
        r"deepspeed\.gradient_cliping: unknown key; did you mean gradient_clipping\? .* optimizer\.max_grad_norm owns",
    ),
    "NVMe offload": (
        "deepspeed.zero_optimization.offload_optimizer.device=nvme",
        r"offload_optimizer\.device: got nvme, expected cpu or none: NVMe offload takes only",
    ),
    "full over 4 bits": ("method.name=full", r"model\.quantization: got nf4, expected none with method\.name full"),
    "home folder": ("model.name_or_path=~/llama", r"model\.name_or_path: got ~/llama, expected a path written out"),
    "global batch of no whole micro batches": (
        "train.global_batch_size=12",
        r"train\.global_batch_size: got 12, expected a multiple of train\.micro_batch_size \(8\)",
    ),
    "no section": ("max_steps=5", r"--set: got 'max_steps=5', expected section\.key=value, for example train\.max"),
    "no value": ("train.max_steps", r"--set: got 'train\.max_steps', expected section\.key=value"),
    "key below a value": ("train.seed.first=1", r"--set: got train\.seed\.first, but train\.seed is 0 \(integer\), no"),
}


@pytest.mark.parametrize(("setting", "expected"), BAD_SETTINGS.values(), ids=BAD_SETTINGS.keys())
def test_a_bad_setting(run_here: Run, tmp_path: Path, setting: str, expected: str) -> None:
    ended = run_here(["--config", "zero3_sft_ma", *OUTPUT, "--set", setting])
    assert_refused(ended, expected, tmp_path)


# arguments after `--config zero3_sft_ma` -> the message
BAD_ARGUMENTS = {
    "both batch keys": (
        ["--set", "train.global_batch_size=32", "--set", "train.gradient_accumulation_steps=3"],
        r"train\.global_batch_size: got 32, expected a multiple of train\.micro_batch_size \(8\) x "
        r"train\.gradient_accumulation_steps \(3\)",
    ),
    "both batch keys on one rank": (
        ["--set", "train.global_batch_size=32", "--set", "train.gradient_accumulation_steps=2"],
        r"train\.global_batch_size: got 32, but train\.micro_batch_size \(8\) x "
        r"train\.gradient_accumulation_steps \(2\) x ranks \(1\) = 16\. Give only one of",
    ),
    "steps and epochs": (
        ["--set", "train.max_steps=10", "--set", "train.num_epochs=2"],
        r"train\.num_epochs: got 2\.0 together with train\.max_steps 10",
    ),
    "overwrite and resume": (
        ["--set", "train.overwrite=true", "--resume", "auto"],
        r"train\.overwrite: got true \(begin anew\) together with checkpoint\.resume auto",
    ),
}


@pytest.mark.parametrize(("arguments", "expected"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_settings_that_contradict_each_other(
    run_here: Run, tmp_path: Path, arguments: Sequence[str], expected: str
) -> None:
    assert_refused(run_here(["--config", "zero3_sft_ma", *OUTPUT, *arguments]), expected, tmp_path)


def test_all_mistakes_come_at_once(run_here: Run, tmp_path: Path) -> None:
    settings = ["method.densty=1", "train.seed=-1", "deepspeed.zero_optimization.stage=1"]
    ended = run_here(["--config", "zero3_sft_ma", *OUTPUT, *set_words(settings)])
    assert_refused(ended, r"error: .*zero3_sft_ma\.json: 3 problems:\n", tmp_path)
    assert all(f"\n  {setting.split('=')[0]}: " in ended.stderr for setting in settings)


BAD_CONFIG_FILES = {
    "cut short": ('{\n  "train": {', r"config\.json: line 2, column 13: no valid JSON"),
    "a key twice": ('{"train": {"seed": 1, "seed": 2}}', r"no valid JSON: the key seed is given twice in one object"),
    "a list": ("[]", r"config\.json: got \[\] \(list\), expected an object with sections"),
    "empty": ("", r"config\.json: line 1, column 1: no valid JSON"),
    "nothing in it": ("{}", r"config\.json: 2 problems:\n  optimizer: missing.*\n  train: missing"),
    "NaN": ('{"optimizer": {"learning_rate": NaN}}', r"no valid JSON: NaN is no JSON number"),
}


@pytest.mark.parametrize(("content", "expected"), BAD_CONFIG_FILES.values(), ids=BAD_CONFIG_FILES.keys())
def test_a_broken_configuration_file(run_here: Run, tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    assert_refused(run_here(["--config", "config.json"]), expected, tmp_path, files=["config.json"])


BAD_CONFIG_NAMES = {
    "near miss": ("zero3_stf_ma.json", r"--config: zero3_stf_ma\.json is no file.*Did you mean zero3_sft_ma\.json"),
    "a recipe's folder": ("llama2_7b/sft_ma_nf5", r"Did you mean llama2_7b/sft_ma_nf4\.json"),
    "nothing like it": ("qqqq", r"--config: qqqq is no file, expected a path or a name in .*configs\. There is: "),
    "a folder": (".", r"--config: \. is a folder, expected a path"),
    "empty": ("", r"--config: got an empty name"),
}


@pytest.mark.parametrize(("name", "expected"), BAD_CONFIG_NAMES.values(), ids=BAD_CONFIG_NAMES.keys())
def test_an_unknown_configuration(run_here: Run, tmp_path: Path, name: str, expected: str) -> None:
    assert_refused(run_here(["--config", name]), expected, tmp_path)


# variables of the environment -> the message
BAD_LAUNCHES: dict[str, tuple[dict[str, str], str]] = {
    "batch over 3 ranks": (
        RANK_0_OF_3,
        r"train\.global_batch_size: got 32, expected a multiple of train\.micro_batch_size \(8\) x ranks \(3\) = 24, "
        r"for example 24 or 48.* or start 1, 2, 4 ranks",
    ),
    "no address": ({"RANK": "0"}, r"launcher: WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set although RANK"),
    "rank is no number": ({**RANK_0_OF_2, "RANK": "first"}, r"launcher: RANK='first', expected a whole number"),
    "size is no number": ({**RANK_0_OF_2, "WORLD_SIZE": "2.0"}, r"launcher: WORLD_SIZE='2\.0', expected a whole"),
    "more ranks than the size": ({**RANK_0_OF_2, "WORLD_SIZE": "0"}, r"launcher: RANK=0 with WORLD_SIZE=0"),
    "unreadable node list": (
        {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "gpu[1-2"},
        r"srun: cannot read the node list 'gpu\[1-2'; set MASTER_ADDR",
    ),
    "fp16 of accelerate": (
        {**RANK_0_OF_2, "ACCELERATE_MIXED_PRECISION": "fp16"},
        r"ACCELERATE_MIXED_PRECISION: the launcher says fp16, the configuration says model\.dtype bfloat16",
    ),
    "accumulation of accelerate": (
        {**RANK_0_OF_2, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"},
        r"GRADIENT_ACCUMULATION_STEPS: the launcher says 3, the configuration says train\.gradient_accumulation\w+ 2",
    ),
    "FSDP of accelerate": (
        {**RANK_0_OF_2, "ACCELERATE_USE_FSDP": "true"},
        r"ACCELERATE_USE_FSDP: the launcher says true \(FSDP\), the configuration says DeepSpeed ZeRO stage 3",
    ),
    "ZeRO stage of accelerate": (
        {**RANK_0_OF_2, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
        r"ACCELERATE_DEEPSPEED_ZERO_STAGE: the launcher says 2, the configuration says ZeRO stage 3",
    ),
}


@pytest.mark.parametrize(("environment", "expected"), BAD_LAUNCHES.values(), ids=BAD_LAUNCHES.keys())
def test_a_launcher_that_does_not_fit(
    run_here: Run, tmp_path: Path, environment: dict[str, str], expected: str
) -> None:
    ended = run_here(["--config", "zero3_sft_ma", *OUTPUT], environment)
    assert_refused(ended, expected, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [([], "the following arguments are required: --config"), (["--config", "x", "--sett", "a.b=1"], "unrecognized")],
)
def test_the_wrong_arguments(run_here: Run, tmp_path: Path, arguments: Sequence[str], expected: str) -> None:
    ended = run_here(arguments)
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert expected in ended.stderr and ended.stderr.startswith("usage: ") and "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_found_without_the_heavy_imports(tmp_path: Path) -> None:
    """A new process, so that it is the real command; the others are then right to run in this one."""
    program = (
        "import runpy, sys\n"
        "try:\n"
        f"    runpy.run_path({str(TRAIN)!r}, run_name='__main__')\n"
        "finally:\n"
        "    print(sorted({'torch', 'deepspeed', 'transformers', 'accelerate', 'datasets'} & sys.modules.keys()))\n"
    )
    arguments = ["--config", "zero3_sft_ma", "--set", "train.seed=-1"]
    environment = {name: value for name, value in os.environ.items() if not is_launcher_variable(name)}
    ended = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout) == (2, "[]\n"), ended.stderr
    assert json.dumps(str(ROOT / "configs" / "zero3_sft_ma.json")).strip('"') in ended.stderr
    assert list(tmp_path.iterdir()) == []
