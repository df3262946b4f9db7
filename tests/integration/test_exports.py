"""What a finished run can be turned into: its checkpoints hold the adapter, which knows where it comes from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from finished_runs import FinishedRun

from sparse_ds.adapter.native import load_adapter
from sparse_ds.adapter.of_checkpoint import CheckpointAdapter

FILES = ("adapter_config.json", "adapter_model.safetensors")


def test_the_last_checkpoint_holds_the_adapter_of_the_run(tmp_path: Path, checkpointed_run: FinishedRun) -> None:
    folder = checkpointed_run.folder
    command = [sys.executable, "-m", "sparse_ds.cli", "export", str(folder / "checkpoint-14"), str(tmp_path / "out")]
    ended = subprocess.run([*command, "--format", "native"], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended
    for file in FILES:
        assert (tmp_path / "out" / file).read_bytes() == (folder / "adapter" / file).read_bytes()
    earlier = CheckpointAdapter(folder / "checkpoint-6")
    assert earlier.index_hash == checkpointed_run.index_hashes[2] != load_adapter(folder / "adapter").index_hash


def test_the_adapter_knows_its_base_and_its_ages(checkpointed_run: FinishedRun) -> None:
    config = load_adapter(checkpointed_run.folder / "adapter").config
    assert config.base.name == "embedded" and config.base.weights_hash is not None
    last_event = checkpointed_run.of_kind("event")[-1]
    assert {str(step): count for step, count in (config.birth_steps or {}).items()} == last_event["birth_steps"]
    content = json.loads((checkpointed_run.folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert sum(content["birth_steps"].values()) == last_event["active"]
