"""Where a base model is found: local folders, and a hub that real processes with the real client ask at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_double import Files, HubAskers, HubDouble, wait_for

from sparse_ds.config.errors import UserError
from sparse_ds.model.find_base_model import find_base_model

CONFIG = json.dumps({"model_type": "llama"}).encode()
SMALL: Files = {"config.json": CONFIG, "tokenizer.json": b"{}", "tokenizer_config.json": b"{ }"}
WEIGHTS = "model.safetensors"
NOT_WANTED: Files = {
    "README.md": b"read me",
    "consolidated.safetensors": b"the same again",
    "original/consolidated.00.pth": b"and again",
    "configuration_own.py": b"raise SystemExit",
}


def index_of(*shards: str) -> bytes:
    return json.dumps({"weight_map": {f"tensor.{shard}": shard for shard in shards}}).encode()


def locks_of(askers: HubAskers, name: str) -> Path:
    return askers.cache / ".locks" / f"models--{name.replace('/', '--')}"


@pytest.fixture(scope="module")
def server() -> Iterator[HubDouble]:
    hub = HubDouble()
    yield hub
    hub.close()


@pytest.fixture
def hub(server: HubDouble) -> HubDouble:
    server.reset()
    return server


@pytest.fixture(scope="module")
def askers(server: HubDouble, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubAskers]:
    askers = HubAskers(server.url, tmp_path_factory.mktemp("hub"))
    yield askers
    askers.close()


def test_local_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama").mkdir()
    assert find_base_model(str(tmp_path / "llama")) == tmp_path / "llama"
    assert (find_base_model("embedded") / "config.json").is_file()
    monkeypatch.chdir(tmp_path)
    assert find_base_model("llama") == Path("llama")
    with pytest.raises(UserError, match=r"model.name_or_path: got 'lama', which is no folder .* Did you mean llama\?"):
        find_base_model("lama")
    with pytest.raises(UserError, match=r"got '.*/lama', which is no folder .* Did you mean .*/llama\?"):
        find_base_model(str(tmp_path / "lama"))
    with pytest.raises(UserError, match=r"there is no embedded model 'embedded:other'"):
        find_base_model("embedded:other")


def test_of_three_processes_one_downloads(hub: HubDouble, askers: HubAskers) -> None:
    commit = hub.push("owner/three", {**SMALL, **NOT_WANTED, WEIGHTS: b"weights"})
    go_on = threading.Event()
    hub.before_transfer = lambda file: go_on.wait() if file.endswith(WEIGHTS) else None
    processes = askers.start("owner/three", num=3)
    wait_for(lambda: all(process.said for process in processes))
    # Nobody hears from the hub again what main is.
    hub.push("owner/three", {**SMALL, WEIGHTS: b"newer"})
    go_on.set()
    assert {process.folder.name for process in processes} == {commit}
    assert (processes[0].folder / WEIGHTS).read_bytes() == b"weights"
    assert hub.transfers == {f"owner/three/{file}": 1 for file in [*SMALL, WEIGHTS]}
    lines = [line.partition(": ")[2].partition(": ")[2] for process in processes for line in process.said]
    (downloading,) = [line for line in lines if line.startswith("downloading")]
    cache = askers.cache
    assert downloading == f"downloading owner/three (commit {commit}) to {cache}; other processes that want it wait"
    waiting = [line for line in lines if line.startswith("waiting for ")]
    assert len(waiting) == 2 and all(line.endswith(f" to download owner/three to {cache}") for line in waiting), lines
    assert not (locks_of(askers, "owner/three") / "sparse_ds.holder").exists()


def test_a_machine_speaks_once(hub: HubDouble, askers: HubAskers) -> None:
    """Whichever process downloads: the first of the machine says that it does, or that it waits."""
    hub.push("owner/once", {**SMALL, WEIGHTS: b"weights"})
    go_on = threading.Event()
    hub.before_transfer = lambda file: go_on.wait() if file.endswith(WEIGHTS) else None
    processes = askers.start("owner/once", num=3, heard=False)
    wait_for(lambda: processes[0].said)
    go_on.set()
    assert len({process.folder for process in processes}) == 1
    assert [len(process.said) for process in processes] == [1, 0, 0]
    (line,) = processes[0].said
    assert ("downloading owner/once (commit" in line) or ("waiting for " in line and "to download owner/once" in line)


def test_a_killed_process_does_not_keep_the_others_waiting(hub: HubDouble, askers: HubAskers) -> None:
    hub.push("owner/killed", {**SMALL, WEIGHTS: b"weights"})
    go_on = threading.Event()
    hub.before_transfer = lambda file: go_on.wait() if file.endswith(WEIGHTS) else None
    (first,) = askers.start("owner/killed")
    wait_for(lambda: hub.transfers[f"owner/killed/{WEIGHTS}"])
    second, third = askers.start("owner/killed", num=2)
    for process in (second, third):
        (line,) = wait_for(lambda process=process: process.said)
        assert f"waiting for process {first.pid} on " in line
    os.kill(first.pid, signal.SIGKILL)
    wait_for(lambda: hub.transfers[f"owner/killed/{WEIGHTS}"] == 2)
    assert not second.log.with_suffix(".json").exists() and not third.log.with_suffix(".json").exists()
    go_on.set()
    assert second.folder == third.folder and (second.folder / WEIGHTS).read_bytes() == b"weights"
    assert hub.transfers == {**{f"owner/killed/{file}": 1 for file in SMALL}, f"owner/killed/{WEIGHTS}": 2}
    said = sorted(line.partition(": ")[2].partition(": ")[2][:11] for line in second.said + third.said)
    assert said == ["downloading", "waiting for", "waiting for"]


def test_a_complete_cache_is_only_read(hub: HubDouble, askers: HubAskers) -> None:
    commit = hub.push("owner/cached", {**SMALL, WEIGHTS: b"weights"})
    folder = askers.ask("owner/cached").folder
    shutil.rmtree(askers.cache / ".locks")
    before = {path: path.lstat().st_mtime_ns for path in askers.cache.rglob("*")}
    hub.reset()
    assert askers.ask("owner/cached").folder == folder
    assert hub.requests == ["GET /api/models/owner/cached"]
    hub.reset()
    assert askers.ask("owner/cached", commit).folder == folder
    assert askers.ask("owner/cached", offline=True).folder == folder
    assert askers.ask("owner/cached", commit, offline=True).folder == folder
    assert hub.requests == []
    hub.is_down = True
    assert askers.ask("owner/cached").folder == folder
    assert {path: path.lstat().st_mtime_ns for path in askers.cache.rglob("*")} == before


def test_a_file_that_the_cache_lacks_is_fetched(hub: HubDouble, askers: HubAskers) -> None:
    """Other programs leave caches with a few files of a repository, with or without the list of all."""
    hub.push("owner/part", {**SMALL, WEIGHTS: b"weights"})
    folder = askers.ask("owner/part").folder
    (folder / WEIGHTS).resolve().unlink()
    (folder / WEIGHTS).unlink()
    assert "could not be had from the hub (The cached snapshot" in askers.ask("owner/part", offline=True).error
    hub.reset()
    assert askers.ask("owner/part").folder == folder
    (folder / "tokenizer.json").resolve().unlink()
    (folder / "tokenizer.json").unlink()
    shutil.rmtree(folder.parents[1] / "trees")
    assert askers.ask("owner/part").folder == folder
    assert hub.transfers == {f"owner/part/{file}": 1 for file in (WEIGHTS, "tokenizer.json")}


def test_a_cache_in_which_no_lock_can_be_made(hub: HubDouble, askers: HubAskers) -> None:
    """Files that are all there are found although nothing can be written, and without the list of files."""
    hub.push("owner/locked", {**SMALL, WEIGHTS: b"weights"})
    folder = askers.ask("owner/locked").folder
    shutil.rmtree(folder.parents[1] / "trees")
    locks = locks_of(askers, "owner/locked")
    shutil.rmtree(locks)
    locks.touch()  # no folder can be made in its place; permissions do not stop root
    hub.reset()
    assert askers.ask("owner/locked").folder == folder
    assert hub.transfers == {}


@pytest.mark.parametrize(
    ("name", "weights", "others"),
    [
        ("one", {WEIGHTS: b"w"}, {"pytorch_model.bin": b"w"}),
        (
            "one-beside-bin-shards",
            {WEIGHTS: b"w", "pytorch_model.bin.index.json": index_of("pytorch_model-1.bin", "pytorch_model-2.bin")},
            {"pytorch_model-1.bin": b"1", "pytorch_model-2.bin": b"2"},
        ),
        (
            "shards",
            {"model-1.safetensors": b"1", "model-2.safetensors": b"2"}
            | {f"{WEIGHTS}.index.json": index_of("model-1.safetensors", "model-2.safetensors")},
            {"model-3.safetensors": b"3", "pytorch_model.bin": b"w"},
        ),
        ("bin", {"pytorch_model.bin": b"w"}, {"pytorch_model.h5": b"w"}),
        (
            "bin-shards",
            {"pytorch_model.bin.index.json": index_of("pytorch_model-1.bin"), "pytorch_model-1.bin": b"1"},
            {"rust_model.ot": b"w"},
        ),
    ],
)
def test_one_form_of_the_weights_is_downloaded(
    hub: HubDouble, askers: HubAskers, name: str, weights: Files, others: Files
) -> None:
    hub.push(f"owner/{name}", {**SMALL, **weights, **NOT_WANTED, **others})
    asker = askers.ask(f"owner/{name}")
    assert hub.transfers == {f"owner/{name}/{file}": 1 for file in [*SMALL, *weights]}
    assert sorted(path.name for path in asker.folder.iterdir()) == sorted([*SMALL, *weights])
    assert "No files matched" not in asker.log.read_text()


@pytest.mark.parametrize(
    ("name", "revision", "is_down", "reason"),
    [
        ("owner/absent", None, False, r"404 Client Error.*"),
        ("owner/present", "v2", False, r"404 Client Error.*"),
        ("owner/unreachable", None, True, r"Cannot resolve revision 'main' .* the Hub could not be reached .*"),
    ],
)
def test_what_the_hub_has_not(
    hub: HubDouble, askers: HubAskers, name: str, revision: str | None, is_down: bool, reason: str
) -> None:
    hub.push("owner/present", {**SMALL, WEIGHTS: b"weights"})
    hub.is_down = is_down
    processes = askers.start(name, revision, num=2)
    message = rf"model.name_or_path: '{name}' is no local folder and could not be had from the hub \({reason}\). Check"
    for process in processes:
        with pytest.raises(UserError, match=message):
            raise UserError(process.error)
        assert process.said == []


def test_an_unknown_model_offline(askers: HubAskers) -> None:
    error = askers.ask("owner/unknown", offline=True).error
    assert error.startswith("model.name_or_path: 'owner/unknown' is no local folder and could not be had from the hub")
    assert not locks_of(askers, "owner/unknown").exists()


def test_remote_code_is_refused_before_the_weights_are_downloaded(hub: HubDouble, askers: HubAskers) -> None:
    config = {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    hub.push("owner/own", {**SMALL, **NOT_WANTED, "config.json": json.dumps(config).encode(), WEIGHTS: b"weights"})
    error = askers.ask("owner/own").error
    assert "is a 'own' model that needs code of its repository, and remote code is never executed; expected" in error
    assert hub.transfers == {f"owner/own/{file}": 1 for file in SMALL}
