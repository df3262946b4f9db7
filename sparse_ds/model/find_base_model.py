"""Where a base model lies: inside the package, in a local folder, or on the hub, from where a machine gets it once.

    commit      every process asks the hub what the revision means now; everything after is of that commit
    cached      a complete cache is only read: no lock, nothing is written, no file is asked for
    download    by the process that has the lock of the repository; others wait, outside of any collective, and then
                find the cache complete

The system releases the lock of a process that dies, and the next one goes on. What is said here is said by all
processes; `cli` lets the first of each machine be heard.
"""

from __future__ import annotations

import difflib
import logging
import socket
from contextlib import AbstractContextManager
from pathlib import Path

from huggingface_hub import constants, get_cached_repo_tree, resolve_revision, snapshot_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError
from huggingface_hub.file_download import repo_folder_name

from sparse_ds.config.errors import UserError
from sparse_ds.distributed import process_group
from sparse_ds.distributed.turns import turn
from sparse_ds.embedded import resolve_model
from sparse_ds.model.base_checkpoint import BIN, SAFETENSORS, TOKENIZER_FILES, read_index, read_json
from sparse_ds.model.kinds import check_model_type

logger = logging.getLogger(__name__)


def find_base_model(name_or_path: str, revision: str | None = None) -> Path:
    """Folder with the files of a base model.

    Args:
        name_or_path: "embedded", a local folder, or a hub name "owner/name" (downloaded once per machine or shared
            cache: concurrent callers wait for the one that downloads).
        revision: branch, tag or commit of a hub name.

    Raises:
        UserError: nothing of that name; a hub model of an architecture that is not supported.
    """
    local = Path(resolve_model(name_or_path)).expanduser()
    if local.is_dir():
        return local
    is_hub_name = name_or_path.count("/") == 1 and not name_or_path.startswith((".", "/", "~")) and not local.exists()
    if is_hub_name:
        return _from_hub(name_or_path, revision)
    parent = local.parent if local.parent.is_dir() else Path()
    near = difflib.get_close_matches(local.name, [path.name for path in parent.iterdir() if path.is_dir()], n=1)
    hint = f" Did you mean {parent / near[0]}?" if near else ""
    raise UserError(
        f"model.name_or_path: got {name_or_path!r}, which is no folder (looked in {Path.cwd()}); expected `embedded`, "
        f"a local folder with config.json and *.safetensors, or a hub name like owner/name.{hint}"
    )


def require_same_base(folder: Path, fingerprint: str) -> None:
    """Stop the run on all ranks if they would read different base models.

    A branch of the hub can move between the downloads of two machines, and a local folder can differ between them.

    Args:
        folder: of the base model on this rank. In the hub's cache its name is the commit.
        fingerprint: `BaseCheckpoint.fingerprint()` of it.

    Raises:
        UserError: on all ranks; says which rank on which host reads what.

    Collectives: one gather of a short text; every rank must call it.
    """
    places = process_group.gather(((fingerprint, folder.name), f"{socket.gethostname()}: {folder}"))
    num_ranks_by_base: dict[tuple[str, str], int] = {}
    first_by_base: dict[tuple[str, str], str] = {}
    for rank, (base, place) in enumerate(places):
        num_ranks_by_base[base] = num_ranks_by_base.get(base, 0) + 1
        first_by_base.setdefault(base, f"rank {rank} on {place}")
    if len(first_by_base) == 1:
        return
    described = "; ".join(f"{first} ({num_ranks_by_base[base]} rank(s))" for base, first in first_by_base.items())
    raise UserError(
        f"model.name_or_path: the ranks have different base models: {described}. Make the folders the same on all "
        "machines; of a hub model, give the commit as model.revision."
    )


def _from_hub(name: str, revision: str | None) -> Path:
    try:
        # A download takes minutes to hours, in which a branch can move: nobody asks what it means after that.
        commit = resolve_revision(name, revision=revision)
        if constants.is_offline_mode():
            return _snapshot(name, commit, local_files_only=True)
        folder = _cached(name, commit)
        if folder is None:
            with _turn_to_download(name):
                folder = _cached(name, commit)
                if folder is None:
                    message = "%s: downloading %s (commit %s) to %s; other processes that want it wait"
                    logger.info(message, socket.gethostname(), name, commit.resolved, constants.HF_HUB_CACHE)
                    folder = _snapshot(name, commit, local_files_only=False)
        return folder
    except UserError:
        raise
    except Exception as error:  # huggingface_hub raises its own, httpx's, xet's and the system's
        first_line = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"model.name_or_path: {name!r} is no local folder and could not be had from the hub ({first_line}). "
            "Check the name, log in with `hf auth login` for a gated model, or give the path of a local copy."
        ) from error


def _cached(name: str, commit: str) -> Path | None:
    """The folder of the commit in the cache, if everything that is needed is known to be there."""
    try:
        # Only with this list can the cache say whether a file is missing or does not exist.
        get_cached_repo_tree(name, revision=commit)
        return _snapshot(name, commit, local_files_only=True)
    except (CachedRepoTreeNotFoundError, LocalEntryNotFoundError):
        return None


def _snapshot(name: str, commit: str, *, local_files_only: bool) -> Path:
    """The files of a commit that are needed, of those that exist: the rest is said by who reads them."""

    def fetch(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(name, revision=commit, allow_patterns=patterns, local_files_only=local_files_only)
        )

    folder = fetch(["*.json", *TOKENIZER_FILES])
    # Before gigabytes are on their way.
    check_model_type(read_json(folder / "config.json"), folder)
    # Repositories may hold the same weights in several forms (Mistral: consolidated.safetensors): take one, the one
    # that `BaseCheckpoint` reads.
    for weights in (SAFETENSORS, BIN):
        if (folder / f"{weights}.index.json").is_file():
            return fetch(sorted(set(read_index(folder / f"{weights}.index.json").values())))
        # With a file that is there in any case: huggingface_hub warns of a list that nothing matches.
        if (fetch(["config.json", weights]) / weights).is_file():
            break
    return folder


def _turn_to_download(name: str) -> AbstractContextManager[bool]:
    """Wait until no other process downloads this repository, and keep the others out.

    A cache that cannot be written to needs no lock: either everything is there, or the download says why it fails.
    """
    folder = Path(constants.HF_HUB_CACHE, ".locks", repo_folder_name(repo_id=name, repo_type="model"))

    def say_waiting(other: str) -> None:
        message = "%s: waiting for %s to download %s to %s"
        logger.warning(message, socket.gethostname(), other, name, constants.HF_HUB_CACHE)

    return turn(folder, "sparse_ds", say_waiting)
