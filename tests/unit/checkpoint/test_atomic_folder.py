"""A folder is there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sparse_ds.checkpoint.atomic_folder import atomic_folder, remove_folder, remove_leftovers
from sparse_ds.config.errors import UserError


def test_folder_appears_whole_with_its_parents(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "result"
    with atomic_folder(folder, marker="m") as partial:
        (partial / "m").write_text("1")
        assert not folder.exists()
    assert (folder / "m").read_text() == "1"
    assert os.listdir(folder.parent) == ["result"]


def test_files_get_the_mode_of_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "result", marker="m") as partial:
            (partial / "m").write_text("1")
            (partial / "m").chmod(0o600)
    finally:
        os.umask(old)
    assert (tmp_path / "result" / "m").stat().st_mode & 0o777 == 0o640


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    with atomic_folder(tmp_path, marker="m") as partial:
        (partial / "m").write_text("1")
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_folder(tmp_path / "result", marker="m") as partial:
        (partial / "m").write_text("1")
        raise error
    assert os.listdir(tmp_path) == []


def test_overwrite_replaces_only_on_success(tmp_path: Path) -> None:
    folder = tmp_path / "result"
    with atomic_folder(folder, marker="m") as partial:
        (partial / "m").write_text("old")
        (partial / "extra").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(folder, marker="m", overwrite=True):
        raise RuntimeError
    assert sorted(os.listdir(folder)) == ["extra", "m"]
    with atomic_folder(folder, marker="m", overwrite=True) as partial:
        (partial / "m").write_text("new")
    assert os.listdir(folder) == ["m"]
    assert (folder / "m").read_text() == "new"
    assert os.listdir(tmp_path) == ["result"]


def test_an_old_folder_comes_back_if_the_new_one_cannot_be_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "result"
    folder.mkdir()
    (folder / "m").write_text("old")
    rename = os.rename

    def failing_rename(source: Path, target: Path) -> None:
        if ".partial-" in str(source):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing_rename)
    with pytest.raises(OSError, match="no"), atomic_folder(folder, marker="m", overwrite=True) as partial:
        (partial / "m").write_text("new")
    assert (folder / "m").read_text() == "old"
    assert os.listdir(tmp_path) == ["result"]


def test_existing_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("old")
    with pytest.raises(UserError, match="already exists and is not empty"), atomic_folder(tmp_path, marker="m"):
        pytest.fail("must not get here")


def test_foreign_folder_is_refused_even_with_overwrite(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with (
        pytest.raises(UserError, match=r"holds other files and no 'config\.json'"),
        atomic_folder(tmp_path, marker="config.json", overwrite=True),
    ):
        pytest.fail("must not get here")
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "result").write_text("a file")
    with pytest.raises(UserError, match="is a file"), atomic_folder(tmp_path / "result", marker="m", overwrite=True):
        pytest.fail("must not get here")


def test_leftovers_of_a_killed_process_go(tmp_path: Path) -> None:
    context = atomic_folder(tmp_path / "checkpoint-5", marker="m")
    partial = context.__enter__()
    (partial / "m").write_text("half")
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in (".adapter.replaced-01ab", ".checkpoint-3.removed-01ab"):
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "checkpoint-4"]


def test_a_folder_is_gone_before_its_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    (folder / "m").write_text("1")
    seen = []
    monkeypatch.setattr("shutil.rmtree", lambda path, **_: seen.append((sorted(os.listdir(path)), folder.exists())))
    remove_folder(folder)
    assert seen == [(["m"], False)]
