"""A mistake on two ranks: the message once, and all of them end, at once.

Two real launches, one ending before the process group exists and one after, and forked ranks for mistakes that only
one of the ranks can see.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from forks import free_port, train_in_forks
from launches import PROGRAMS, TRAIN, launch
from safetensors.torch import load_file, save_file
from short_run import RUN_ARGUMENTS, save_rows, set_words

from sparse_ds.cli import USER_ERROR_EXIT_CODE
from sparse_ds.embedded import resolve_model

SECONDS_TO_END = 60.0
"""Imports take most of it; a rank that waits for another would wait for minutes."""


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    save_rows(folder, 32)
    return folder


def save_model_with_nan(folder: Path) -> None:
    shutil.copytree(resolve_model("embedded"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][5, 6] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_before_the_process_group_exists(work: Path) -> None:
    command = [PROGRAMS / "deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()), TRAIN]
    ended = launch([*command, *RUN_ARGUMENTS, "--set", "method.densty=0.1"], work, timeout_s=SECONDS_TO_END)
    output = ended.stdout + ended.stderr
    assert ended.exit_code == USER_ERROR_EXIT_CODE, output
    assert output.count("error: ") == 1, output
    assert output.count("method.densty: unknown key; did you mean method.density? (from --set)") == 1, output
    assert "Traceback" not in output
    assert [entry.name for entry in work.iterdir()] == ["rows.jsonl"]


def test_inside_the_process_group(work: Path) -> None:
    save_model_with_nan(work / "model")
    command = [PROGRAMS / "torchrun", "--standalone", "--nproc-per-node", "2", TRAIN, *RUN_ARGUMENTS]
    ended = launch([*command, "--set", "model.name_or_path=model"], work, timeout_s=SECONDS_TO_END)
    output = ended.stdout + ended.stderr
    assert ended.exit_code != 0
    tensor = "tensor 'model.layers.2.mlp.up_proj.weight' of model holds NaN or Inf"
    message = f"error: model.name_or_path: {tensor}; the checkpoint"
    assert output.count(message) == 1, output
    # torchrun reports the exit code of the ranks in a traceback of its own; the ranks show none.
    assert "exitcode  : 2" in output
    assert output.count("Traceback") == 1 and "cli.py" not in output, output
    assert {entry.name for entry in work.iterdir()} == {"rows.jsonl", "model"}


@pytest.mark.parametrize("rank_without", [0, 1])
def test_data_that_only_one_rank_lacks(work: Path, rank_without: int) -> None:
    """As on machines of which one has not got the file: rank 0 says it, whichever rank it is."""
    empty = work.parent / "empty"
    empty.mkdir()
    folders = [empty, work] if rank_without == 0 else [work, empty]
    ranks = train_in_forks([RUN_ARGUMENTS] * 2, folders, timeout_s=SECONDS_TO_END)
    assert [rank.exit_code for rank in ranks] == [USER_ERROR_EXIT_CODE] * 2, ranks
    message = "error: data.train: no such file: rows.jsonl."
    assert ranks[0].stderr.startswith(message) and ranks[0].stderr.count("error") == 1, ranks[0]
    assert f"(on rank {rank_without}, 1 of 2 ranks)" in ranks[0].stderr
    assert ranks[1].stderr == ""
    assert list(empty.iterdir()) == [] and [entry.name for entry in work.iterdir()] == ["rows.jsonl"]


def test_base_models_that_differ_between_machines(work: Path) -> None:
    other = work.parent / "other"
    for folder in (work, other):
        shutil.copytree(resolve_model("embedded"), folder / "model")
    save_rows(other, 32)
    config = other / "model" / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": ', '"rms_norm_eps": 1'))
    arguments = [*RUN_ARGUMENTS, *set_words(["model.name_or_path=model"])]
    ranks = train_in_forks([arguments] * 2, [work, other], timeout_s=SECONDS_TO_END)
    assert [rank.exit_code for rank in ranks] == [USER_ERROR_EXIT_CODE] * 2, ranks
    message = "error: model.name_or_path: the ranks have different base models: rank 0 on "
    assert ranks[0].stderr.startswith(message) and "; rank 1 on " in ranks[0].stderr, ranks[0]
    assert ranks[1].stderr == ""
    assert {entry.name for entry in work.iterdir()} == {"rows.jsonl", "model"}


def test_an_output_folder_that_cannot_be_made(work: Path) -> None:
    """Rank 0 alone makes it; the other learns that it failed."""
    (work / "notes").write_text("mine", encoding="utf-8")
    arguments = [*RUN_ARGUMENTS, *set_words(["train.output_dir=notes/run"])]
    ranks = train_in_forks([arguments] * 2, [work] * 2, timeout_s=SECONDS_TO_END)
    assert [rank.exit_code for rank in ranks] == [USER_ERROR_EXIT_CODE] * 2, ranks
    assert ranks[0].stderr.startswith("error: train.output_dir: cannot write to notes/run (Not a directory)")
    assert ranks[1].stderr == ""
    assert (work / "notes").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(("key", "what"), [("data.train", "data"), ("data.eval", "held-out data")])
def test_data_that_is_another_on_one_rank(work: Path, key: str, what: str) -> None:
    """As on machines with files of two versions: the run would go on, on a mixture."""
    other = Path(shutil.copytree(work, work.parent / "other"))
    rows = (other / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (work / "checked.jsonl").write_text("".join(rows), encoding="utf-8")
    (other / "checked.jsonl").write_text("".join([*rows[:-1], rows[0]]), encoding="utf-8")
    arguments = [*RUN_ARGUMENTS, "--set", f"{key}=checked.jsonl", "--set", "data.num_eval_samples=null"]
    ranks = train_in_forks([arguments] * 2, [work, other], timeout_s=SECONDS_TO_END)
    assert [rank.exit_code for rank in ranks] == [USER_ERROR_EXIT_CODE] * 2, ranks
    assert ranks[0].stderr.startswith(
        f"error: the ranks do not carry out the same run: {what} of ranks [1] is not that of"
    )
    assert ranks[1].stderr == ""
    assert not (work / "run").exists()
