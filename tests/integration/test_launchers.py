"""The commands of the README, literally: the same file and the same numbers under every launcher."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from finished_runs import FinishedRun, index_overlap
from forks import free_port
from launches import PROGRAMS, ROOT, TRAIN, Launched, environment_of_user, launch, start, wait
from short_run import set_words

from sparse_ds.distributed.launch_environment import SLURM_PORT_BASE, SLURM_PORT_RANGE

ACCELERATE_CPU = ROOT / "configs" / "accelerate" / "cpu.yaml"
NUM_STEPS, EVENT_STEPS = 8, (2, 6)
SHORT = (
    f"train.max_steps={NUM_STEPS}",
    "method.interval_steps=4",
    "method.estimation_steps=2",
    "data.num_eval_samples=24",
    "monitor.sample_max_tokens=4",
    "train.device=cpu",
)
ONE_LINE_HINT = "sparse_ds: no GPU here, so `deepspeed` started 1 rank on the CPU; for two ranks: "


def arguments_of(output: str | Path, config: str = "zero3_sft_ma.json") -> list[str]:
    settings = [f"train.output_dir={output}", *SHORT]
    return ["--config", config, *set_words(settings)]


def run_deepspeed(folder: Path) -> list[Launched]:
    port = str(free_port())
    command = [PROGRAMS / "deepspeed", "--num_accelerators", "2", "--master_port", port, TRAIN, *arguments_of("run")]
    return [launch(command, folder)]


def run_accelerate(folder: Path) -> list[Launched]:
    command = [PROGRAMS / "accelerate", "launch", "--config_file", ACCELERATE_CPU, TRAIN, *arguments_of("run")]
    return [launch(command, folder)]


def run_torchrun(folder: Path) -> list[Launched]:
    """With the configuration as a path."""
    config = os.path.relpath(ROOT / "configs" / "zero3_sft_ma.json", folder)
    command = [PROGRAMS / "torchrun", "--standalone", "--nproc-per-node", "2", TRAIN, *arguments_of("run", config)]
    return [launch(command, folder)]


def run_srun(folder: Path) -> list[Launched]:
    """What `srun --ntasks 2 python launcher/train.py` does: two processes, told apart by SLURM's variables only."""
    job = {
        "SLURM_JOB_ID": str(free_slurm_job_id()),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NNODES": "1",
    }
    command = [sys.executable, TRAIN, *arguments_of("run")]
    tasks = [
        start(command, folder, environment={**job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})
        for rank in range(2)
    ]
    return [wait(task) for task in tasks]


def run_literally(folder: Path) -> list[Launched]:
    """`deepspeed launcher/train.py` in the repository, with no number of ranks, the configuration without `.json`."""
    command = [PROGRAMS / "deepspeed", "--master_port", str(free_port()), *literal_words(folder)]
    return [launch(command, ROOT)]


def literal_words(folder: Path) -> list[str]:
    return ["launcher/train.py", *arguments_of(folder / "run", "zero3_sft_ma")]


def free_slurm_job_id() -> int:
    """An id of a job from which a port follows that nobody listens on."""
    for _ in range(100):
        job_id = free_port() % SLURM_PORT_RANGE
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", SLURM_PORT_BASE + job_id)) != 0:
                return job_id
    raise RuntimeError("no free port for a job of srun")


TWO_RANKS = {"deepspeed": run_deepspeed, "accelerate": run_accelerate, "torchrun": run_torchrun, "srun": run_srun}
LAUNCHERS = {**TWO_RANKS, "literal": run_literally}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[list[Launched], FinishedRun]]]:
    """Launcher -> its commands as they ended, and what the run left. Two at a time: launchers alone keep one core."""
    if torch.cuda.is_available():
        pytest.skip("the literal command takes all GPUs; this is about machines without one")
    folders = {name: tmp_path_factory.mktemp(name) for name in LAUNCHERS}
    with ThreadPoolExecutor(max_workers=2) as pool:
        futures = {name: pool.submit(run, folders[name]) for name, run in LAUNCHERS.items()}
        ended = {name: future.result() for name, future in futures.items()}
    for commands in ended.values():
        for command in commands:
            assert command.exit_code == 0, str(command)
    yield {name: (commands, FinishedRun.read(folders[name] / "run")) for name, commands in ended.items()}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_leaves_all_files(launched: dict[str, tuple[list[Launched], FinishedRun]], name: str) -> None:
    _, run = launched[name]
    assert {entry.name for entry in run.folder.iterdir()} == {
        "resolved_config.json",
        "metrics.jsonl",
        "adapter",
        "merged",
    }
    adapter, merged = ({path.name for path in (run.folder / name).iterdir()} for name in ("adapter", "merged"))
    assert {"adapter_config.json", "adapter_model.safetensors"} <= adapter
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= merged
    assert {record["kind"] for record in run.metrics} == {"load", "step", "eval", "event", "summary"}
    assert list(run.losses) == list(range(1, NUM_STEPS + 1))
    assert tuple(run.index_hashes) == EVENT_STEPS
    assert list(run.by_step("eval", "loss")) == [0, NUM_STEPS]
    assert run.config["train"]["max_steps"] == NUM_STEPS and run.config["versions"]["deepspeed"]
    for field in ("loss", "grad_norm", "lr", "tokens_per_second", "memory_gib"):
        assert all(record[field] is not None for record in run.of_kind("step")), field
    summary = run.summary
    assert summary["heldout_loss_after"] == run.by_step("eval", "loss")[NUM_STEPS] < summary["heldout_loss_before"]
    assert summary["index_hash"] == run.index_hashes[EVENT_STEPS[-1]]


@pytest.mark.parametrize("name", [name for name in TWO_RANKS if name != "deepspeed"])
def test_two_ranks_are_bit_equal_under_every_launcher(
    launched: dict[str, tuple[list[Launched], FinishedRun]], name: str
) -> None:
    _, expected = launched["deepspeed"]
    _, run = launched[name]
    assert run.losses == expected.losses
    assert run.by_step("step", "grad_norm") == expected.by_step("step", "grad_norm")
    assert run.by_step("eval", "loss") == expected.by_step("eval", "loss")
    assert run.index_hashes == expected.index_hashes
    for file in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        assert (run.folder / file).read_bytes() == (expected.folder / file).read_bytes(), file


def test_the_table_is_printed_once(launched: dict[str, tuple[list[Launched], FinishedRun]]) -> None:
    for name, (commands, run) in launched.items():
        output = "".join(command.stdout for command in commands)
        before, after = run.summary["heldout_loss_before"], run.summary["heldout_loss_after"]
        assert output.count(f"held-out loss    {before:.4f} before, {after:.4f} after") == 1, name
        assert output.count("sparse_ds: sft_ma on embedded: 36,848 of 967,808 weights train") == 1, name


def test_the_literal_command_is_one_rank_and_says_how_to_start_two(
    launched: dict[str, tuple[list[Launched], FinishedRun]],
) -> None:
    (command,), run = launched["literal"]
    (line,) = [line for line in command.stdout.splitlines() if line.startswith(ONE_LINE_HINT)]
    expected = ["deepspeed", "--num_accelerators", "2", *literal_words(run.folder.parent)]
    assert line == ONE_LINE_HINT + shlex.join(expected)
    _, two_ranks = launched["deepspeed"]
    assert max(abs(run.losses[step] - two_ranks.losses[step]) for step in run.losses) < 1e-2
    assert run.by_step("step", "num_tokens") == two_ranks.by_step("step", "num_tokens")
    assert index_overlap(run, two_ranks) >= 0.99
    for name in TWO_RANKS:
        assert not any(ONE_LINE_HINT in command.stdout for command in launched[name][0]), name


def test_merged_loads_in_plain_transformers_with_the_loss_of_the_run(
    launched: dict[str, tuple[list[Launched], FinishedRun]],
) -> None:
    """`check_merged.py` computes the loss from the definition and imports nothing of the project."""
    _, run = launched["torchrun"]
    program = (
        "import json, sys\n"
        f"sys.path.insert(0, {str(ROOT / 'scripts')!r})\n"
        "import check_merged\n"
        "run = check_merged.Path('run')\n"
        "rows = [json.loads(line) for line in check_merged.EMBEDDED_EVAL.read_text().splitlines()][:24]\n"
        "loss = check_merged.heldout_loss(run / 'merged', rows, 128, 8)\n"
        "print(json.dumps({'loss': loss, 'imported': 'sparse_ds' in sys.modules}))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=run.folder.parent,
        env=environment_of_user({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    answer = json.loads(ended.stdout)
    assert answer["imported"] is False
    # The same batches on the same device; only the number of threads, and with it the order of sums, may differ.
    assert abs(answer["loss"] - run.summary["heldout_loss_after"]) < 1e-4


def test_a_setting_of_accelerate_that_disagrees(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((ROOT / "configs" / "zero3_sft_ma.json").read_text(encoding="utf-8"))
    command = [PROGRAMS / "accelerate", "launch", "--config_file", ACCELERATE_CPU, "--num_processes", "1"]
    command += ["--mixed_precision", "fp16", "--gradient_accumulation_steps", "3"]
    ended = launch([*command, TRAIN, *arguments_of("run", str(tmp_path / "config.json"))], tmp_path)
    assert ended.exit_code != 0
    disagreements = [line for line in ended.stderr.splitlines() if "the launcher says" in line]
    assert disagreements == [
        "  ACCELERATE_MIXED_PRECISION: the launcher says fp16, the configuration says model.dtype bfloat16.",
        "  ACCELERATE_GRADIENT_ACCUMULATION_STEPS: the launcher says 3, the configuration says "
        "train.gradient_accumulation_steps 4.",
    ]
    assert "exitcode  : 2" in ended.stderr
    assert not (tmp_path / "run").exists()
