"""Arguments, the two commands, and how a mistake ends a process; a run itself is in tests/integration."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_ds import cli
from sparse_ds.config import RunConfig, UserError
from sparse_ds.monitor.metrics_log import MetricsLog
from sparse_ds.monitor.summary import RunSummary

CONFIG = ["--config", "zero3_sft_ma"]
SUMMARY = RunSummary(
    heldout_loss_before=3.0,
    heldout_loss_after=2.0,
    num_trained_weights=10,
    num_weights=1000,
    num_steps=5,
    wall_s=1.0,
    tokens_per_second=100.0,
    peak_memory_gib=0.5,
    index_hash="ab",
    sample_prompt=None,
    sample_answer_before=None,
    sample_answer_after=None,
    reference_answer=None,
    adapter_dir=None,
    merged_dir=None,
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process has no rank, and what a test does to the environment and to logging ends with it."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "ACCELERATE_", "TORCHELASTIC_", "DS_ACCELERATOR")
    rest = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    monkeypatch.setattr(os, "environ", rest)
    ours = logging.getLogger("sparse_ds")
    before = ours.handlers, ours.propagate, ours.level
    yield
    ours.handlers, ours.propagate, ours.level = before


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The configurations of the runs that would have been carried out."""
    configs: list[RunConfig] = []
    monkeypatch.setattr(cli, "_carry_out", configs.append)
    return configs


def test_the_configuration_and_its_overrides(started: list[RunConfig]) -> None:
    arguments = [*CONFIG, "--set", "train.max_steps=7", "--set", "train.seed=1", "--set", "train.seed=2"]
    assert cli.train(arguments) == 0
    (config,) = started
    assert (config.train.max_steps, config.train.seed, config.checkpoint.resume) == (7, 2, None)


def test_train_is_a_command_of_the_installed_program_too(started: list[RunConfig]) -> None:
    arguments = [*CONFIG, "--set", "train.max_steps=7", "--resume", "auto"]
    assert cli.main(["train", *arguments]) == cli.train(arguments) == 0
    assert started[0] == started[1]


@pytest.mark.parametrize("local_rank", [["--local_rank=1"], ["--local_rank", "1"], ["--local-rank=1"]])
def test_the_rank_that_a_launcher_passes_is_taken_and_not_used(started: list[RunConfig], local_rank: list[str]) -> None:
    assert cli.train([*local_rank, *CONFIG]) == 0
    assert len(started) == 1


@pytest.mark.parametrize("resume", ["auto", "runs/a/checkpoint-7", "2024", "true", "null", 'a "b"\\c', "läuft"])
def test_resume_is_text_whatever_it_looks_like(started: list[RunConfig], resume: str) -> None:
    assert cli.train([*CONFIG, "--resume", resume]) == 0
    assert started[0].checkpoint.resume == resume


def test_resume_wins_over_the_configuration(started: list[RunConfig]) -> None:
    assert cli.train([*CONFIG, "--set", "checkpoint.resume=old", "--resume", "new"]) == 0
    assert started[0].checkpoint.resume == "new"


@pytest.mark.parametrize("arguments", [[], ["--confg", "x"], [*CONFIG, "train.seed=1"], [*CONFIG, "--resume"]])
def test_wrong_arguments(started: list[RunConfig], capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.train(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: train.py ")
    assert started == []


def test_a_command_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    assert ended.value.code == 2
    assert "usage: sparse-ds" in capsys.readouterr().err


# --- a mistake ends the process


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the process would have slept."""
    seconds: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", seconds.append)
    return seconds


@pytest.mark.parametrize("variables", [{}, {"RANK": "0"}, {"SLURM_PROCID": "0"}, {"RANK": "0", "SLURM_PROCID": "3"}])
def test_rank_0_says_it_at_once(
    capsys: pytest.CaptureFixture[str], pauses: list[float], variables: dict[str, str]
) -> None:
    os.environ.update(variables)
    assert cli.train([*CONFIG, "--set", "train.seed=-1"]) == cli.USER_ERROR_EXIT_CODE == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("error: ") and "train.seed: got -1" in output.err
    assert pauses == []


@pytest.mark.parametrize("variables", [{"RANK": "3"}, {"SLURM_PROCID": "3"}])
def test_another_rank_lets_rank_0_speak_first(
    capsys: pytest.CaptureFixture[str], pauses: list[float], variables: dict[str, str]
) -> None:
    os.environ.update(variables)
    assert cli.train([*CONFIG, "--set", "train.seed=-1"]) == 2
    assert capsys.readouterr().err.startswith("error (rank 3): ")
    assert pauses == [cli.SECONDS_FOR_RANK_0_TO_SPEAK]


def test_a_defect_of_ours_is_no_mistake_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: RunConfig) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(cli, "_carry_out", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        cli.train(CONFIG)


# --- on the way to a run


@pytest.fixture
def run_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, str]]:
    """(launch environment, device type) of the runs that would have been carried out; there is no GPU."""
    from sparse_ds.training import run as run_module

    calls: list[tuple[Any, str]] = []
    monkeypatch.setattr(run_module, "run", lambda config, launch, device_type: calls.append((launch, device_type)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return calls


def test_a_plain_process_is_the_only_rank(run_calls: list[tuple[Any, str]]) -> None:
    assert cli.train(CONFIG) == 0
    ((launch, device_type),) = run_calls
    assert (launch.launcher, launch.rank, launch.world_size, device_type) == ("python", 0, 1, "cpu")
    assert os.environ["DS_ACCELERATOR"] == "cpu"


def test_settings_of_accelerate_do_not_reach_transformers(run_calls: list[tuple[Any, str]]) -> None:
    os.environ.update(ACCELERATE_MIXED_PRECISION="bf16", ACCELERATE_USE_CPU="true")
    assert cli.train(CONFIG) == 0
    assert len(run_calls) == 1
    assert "ACCELERATE_MIXED_PRECISION" not in os.environ and "ACCELERATE_USE_CPU" not in os.environ


@pytest.mark.parametrize(
    ("wanted", "has_gpu", "forced_cpu", "expected"),
    [
        ("auto", False, False, "cpu"),
        ("auto", True, False, "cuda"),
        ("auto", True, True, "cpu"),
        ("cpu", True, False, "cpu"),
        ("cuda", True, False, "cuda"),
    ],
)
def test_the_device(
    monkeypatch: pytest.MonkeyPatch, wanted: str, has_gpu: bool, forced_cpu: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert cli._choose_device(wanted, forced_cpu) == expected


@pytest.mark.parametrize(
    ("has_gpu", "forced_cpu", "message"), [(False, False, "torch finds no GPU"), (True, True, "told to use the CPU")]
)
def test_a_device_that_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, has_gpu: bool, forced_cpu: bool, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    with pytest.raises(UserError, match=rf'train\.device: got "cuda", but .*{message}'):
        cli._choose_device("cuda", forced_cpu)


LITERAL = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_one_rank_of_deepspeed_says_how_to_start_two(
    run_calls: list[tuple[Any, str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    os.environ.update(LITERAL)
    setting = 'method.target_modules=["q_proj", "k_proj"]'
    monkeypatch.setattr(sys, "argv", ["launcher/train.py", "--local_rank=0", *CONFIG, "--set", setting])
    assert cli.train() == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(
        "for two ranks: deepspeed --num_accelerators 2 launcher/train.py --config zero3_sft_ma --set "
        '\'method.target_modules=["q_proj", "k_proj"]\''
    )


@pytest.mark.parametrize(
    "changed", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "1"}, {"TORCHELASTIC_RUN_ID": "1"}]
)
def test_nobody_else_says_it(
    run_calls: list[tuple[Any, str]], capsys: pytest.CaptureFixture[str], changed: dict[str, str]
) -> None:
    os.environ.update(LITERAL | changed)
    assert cli.train(CONFIG) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("rank", "times"), [("0", 1), ("1", 0)])
def test_a_setting_without_effect_is_said_once(
    run_calls: list[tuple[Any, str]], capsys: pytest.CaptureFixture[str], rank: str, times: int
) -> None:
    os.environ.update(LITERAL | {"WORLD_SIZE": "2", "RANK": rank})
    assert cli.train([*CONFIG, "--set", "data.eval=null", "--set", "train.eval_interval_steps=5"]) == 0
    warning = "sparse_ds: train.eval_interval_steps has no effect: data.eval is null."
    assert capsys.readouterr().out.count(warning) == times


# --- report


def write_run(folder: Path, method: str) -> Path:
    folder.mkdir()
    (folder / "resolved_config.json").write_text(json.dumps({"method": {"name": method}}))
    with MetricsLog(folder / "metrics.jsonl") as log:
        log.write("summary", SUMMARY.to_record())
    return folder


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / "sparse", "sft_ma"), write_run(tmp_path / "dense", "full")]
    assert cli.main(["report", *map(str, runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[2:4]] == [["sparse", "sft_ma"], ["dense", "full"]]
    assert "100.0%" in lines[2]


def test_report_of_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"error: Run folder '{tmp_path}' has no readable 'resolved_config.json'")


def test_report_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["report"])
    assert ended.value.code == 2
    assert "usage: sparse-ds report" in capsys.readouterr().err
