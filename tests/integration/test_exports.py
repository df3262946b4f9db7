"""What a finished run can be turned into: its checkpoints hold the adapter, which knows where it comes from."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from finished_runs import FinishedRun
from forks import train_in_forks
from short_run import RUN_ARGUMENTS, set_words

from sparse_ds.adapter.adapter import AdapterConfig
from sparse_ds.adapter.native import load_adapter
from sparse_ds.adapter.of_checkpoint import CheckpointAdapter
from sparse_ds.adapter.opening import open_adapter

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


def test_a_run_writes_what_its_configuration_asks_for(tmp_path: Path, checkpointed_run: FinishedRun) -> None:
    """From the checkpoint of the last step, so that nothing is left but the end."""
    work = Path(shutil.copytree(checkpointed_run.folder.parent, tmp_path / "work"))
    settings = ['export.adapters=["supertuning", "shira"]', "export.merged=true", "export.verify=true"]
    words = [*RUN_ARGUMENTS, *set_words([*settings, "export.index_encoding=delta"]), "--resume", "auto"]
    ranks = train_in_forks([words] * 2, [work] * 2)
    assert [rank.exit_code for rank in ranks] == [0, 0], ranks
    assert "logits of adapter and merged model on 256 random tokens: equal in every bit" in ranks[0].stdout
    assert "The merged model is the one that was trained, on the 4-bit base" in ranks[0].stdout
    native = load_adapter(work / "run" / "adapter")
    assert native.stored.index_encoding == "delta"
    assert native.index_hash == load_adapter(checkpointed_run.folder / "adapter").index_hash
    for peft_format in ("supertuning", "shira"):
        exported = open_adapter(work / "run" / f"adapter_{peft_format}")
        fields = set(AdapterConfig.model_fields)
        assert exported.config.model_dump(include=fields) == native.config.model_dump(include=fields)
        assert exported.index_hash == native.index_hash
    report = json.loads((work / "run" / "merged" / "merge_report.json").read_text(encoding="utf-8"))
    assert report["matrices"].keys() == native.config.shapes.keys()
