"""Tokenized data on disk: made by one process of each machine (or shared file system), read by all others.

    <folder>/<key>/tokens.arrow     the columns, as an Arrow stream; read by memory map, so ranks share its memory
    <folder>/<key>/entry.json       what else is known of the data, and sha256 of both
    <folder>/<key>.lock             whose turn it is to tokenize

The key is a sha256 of all that the tokens follow from: the content of the source (not its name), the tokenizer with its
chat template, the settings, this package's own source files, and the versions of the libraries. Nothing is ever changed
in place: an entry appears by one rename, and one that is damaged is noticed by its hashes and made again.

Who waits, waits in no collective, however long it takes, and says so once. Where the folder cannot be written to, every
process tokenizes for itself, in memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

import datasets
import pyarrow
from datasets import Dataset
from pydantic import TypeAdapter
from transformers import AddedToken

from sparse_ds.config.errors import UserError
from sparse_ds.data.sources import RowSource, TextSource
from sparse_ds.distributed.turns import turn

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from transformers import PreTrainedTokenizerBase

    Tokenized = TypeVar("Tokenized", bound=DataclassInstance)

logger = logging.getLogger(__name__)

TOKENS_FILE, ENTRY_FILE = "tokens.arrow", "entry.json"
KEY_CHARACTERS = 32
"""Of the key's 64: 128 bits."""
_LIBRARIES = ("transformers", "tokenizers", "sentencepiece")
_ROWS_AT_ONCE = 10_000


class _DamagedError(Exception):
    """An entry that is there and cannot be used."""


def default_folder() -> Path:
    """Beside what `datasets` keeps (HF_DATASETS_CACHE, HF_HOME)."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "sparse_ds"


@dataclass(frozen=True)
class TokenCache:
    """Entries for one tokenizer and one set of settings.

    Attributes:
        folder: of all entries.
        common: what all keys have in common, see `describe_tokenizer`; plain JSON types.
    """

    folder: Path
    common: Mapping[str, Any]

    def get(
        self,
        source: RowSource | TextSource,
        settings: Mapping[str, Any],
        kind: type[Tokenized],
        make: Callable[[], Tokenized],
        *,
        field: str,
    ) -> tuple[Tokenized, bool]:
        """The entry of a source; it is made if it is missing.

        Args:
            source: what is tokenized.
            settings: further parts of the key; plain JSON types.
            kind: the dataclass that `make` returns; its field `dataset` is kept as Arrow, the others as JSON.
            make: tokenizes; called by the one process whose turn it is.
            field: the config field that the source comes from, for messages.

        Returns:
            The data, and whether this process has made it.

        Raises:
            UserError: what `make` raises, in the process that called it and in those that waited for it.
        """
        parts = {"source": source_fingerprint(source), **self.common, **settings}
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:KEY_CHARACTERS]
        entry, failed = self.folder / key, self.folder / f"{key}.failed"
        found = _find(entry, kind, says_damage=False)
        if found is not None:
            return found, False
        failure_before = _read_failure(failed)

        def say_waiting(other: str) -> None:
            logger.warning("%s: waiting for %s to tokenize %s", socket.gethostname(), other, field)

        with turn(self.folder, key, say_waiting) as has_waited:
            found = _find(entry, kind, says_damage=True)
            if found is not None:
                return found, False
            failure = _read_failure(failed)
            if has_waited and failure is not None and failure != failure_before:
                raise UserError(failure["message"])
            try:
                made = make()
            except UserError as error:
                _write_failure(failed, error)
                raise
            try:
                failed.unlink(missing_ok=True)
                return self._keep(made, entry, kind), True
            except OSError as error:
                message = "data.cache_dir: %s cannot be written (%s): the tokens of %s stay in memory"
                logger.warning(message, self.folder, error, field)
                return made, True

    def _keep(self, made: Tokenized, entry: Path, kind: type[Tokenized]) -> Tokenized:
        """Write `made`, and return it as every other process will read it."""
        partial = entry.with_name(f".{entry.name}.partial-{secrets.token_hex(4)}")
        try:
            # Left by a process that was killed in its turn; this one is ours.
            for leftover in self.folder.glob(f".{entry.name}.partial-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir(parents=True)
            _write_entry(partial, made)
            shutil.rmtree(entry, ignore_errors=True)
            os.rename(partial, entry)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        try:
            return _read_entry(entry, kind)
        except _DamagedError as error:
            raise OSError(f"what was written reads otherwise: {error}") from error


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """All that tokens follow from besides source and settings, as parts of a key."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state: Any = {name: _file_sha256(path) for name, path in _vocabulary_files(tokenizer)}
        state["vocabulary"] = tokenizer.get_vocab()
    else:
        state = json.loads(backend.to_str())
        # Of the last call, not of the tokenizer.
        state.pop("truncation", None)
        state.pop("padding", None)
    settings = {
        name: value
        for name, value in tokenizer.init_kwargs.items()
        if name not in ("name_or_path", *tokenizer.vocab_files_names)
    }
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    described = [type(tokenizer).__name__, state, settings, special, tokenizer.chat_template]
    return {
        "tokenizer": hashlib.sha256(json.dumps(described, sort_keys=True, default=_plain).encode()).hexdigest(),
        "code": _code_fingerprint(),
        "libraries": " ".join(f"{name} {version(name)}" for name in _LIBRARIES),
    }


def _plain(value: object) -> str:
    """What JSON has no word for. The text of most objects holds an address, which is another in every process."""
    return repr(value) if isinstance(value, AddedToken) else type(value).__name__


def _vocabulary_files(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, Path]]:
    named = {name: getattr(tokenizer, name, None) for name in tokenizer.vocab_files_names}
    return [(name, Path(path)) for name, path in named.items() if path and Path(path).is_file()]


def source_fingerprint(source: RowSource | TextSource) -> str:
    """sha256 of what a source holds: its files where they are known, else its rows."""
    if isinstance(source, TextSource):
        texts = [hashlib.sha256(text.encode()).digest() for text in source.texts]
        return hashlib.sha256(b"text\0" + b"".join(texts)).hexdigest()
    digest = hashlib.sha256(b"files\0" if source.contents else b"rows\0")
    for content in source.contents:
        if isinstance(content, Path):
            digest.update(f"{content.suffix.lower()}\0{_file_sha256(content)}\0".encode())
        else:
            digest.update(f"{content}\0".encode())
    if not source.contents:
        for row in source:
            digest.update(json.dumps(row.fields, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def _code_fingerprint() -> str:
    """sha256 of the files of this package: a change of how samples are made makes them anew."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _find(entry: Path, kind: type[Tokenized], *, says_damage: bool) -> Tokenized | None:
    """The entry, or None if it is missing or has to be made again."""
    try:
        return _read_entry(entry, kind)
    except FileNotFoundError:
        return None
    except (_DamagedError, OSError) as error:
        if says_damage:
            logger.warning("%s: %s is damaged (%s) and will be made again", socket.gethostname(), entry, error)
        return None


def _read_entry(entry: Path, kind: type[Tokenized]) -> Tokenized:
    """Raises FileNotFoundError: there is none. _DamagedError, OSError: it cannot be used."""
    text = (entry / ENTRY_FILE).read_bytes()
    try:
        written = json.loads(text)
        facts, tokens_sha256 = written["facts"], written["tokens_sha256"]
        is_intact = written["sha256"] == _sha256_of(facts, tokens_sha256)
    except (ValueError, KeyError, TypeError) as error:
        raise _DamagedError(f"{ENTRY_FILE}: {type(error).__name__}") from error
    if not is_intact:
        raise _DamagedError(f"{ENTRY_FILE}: another sha256")
    path = entry / TOKENS_FILE
    if not path.is_file() or _file_sha256(path) != tokens_sha256:
        raise _DamagedError(f"{TOKENS_FILE}: missing, or another sha256")
    hints = get_type_hints(kind)
    values = {name: TypeAdapter(hints[name]).validate_python(value) for name, value in facts.items()}
    values["dataset"] = Dataset.from_file(str(path))
    return kind(**values)


def _write_entry(folder: Path, made: DataclassInstance) -> None:
    dataset: Dataset = made.dataset  # type: ignore[attr-defined]
    path = folder / TOKENS_FILE
    # With the features of the data set, which `Dataset.from_file` reads back.
    schema = dataset.features.arrow_schema
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
        for table in dataset.with_format("arrow").iter(_ROWS_AT_ONCE):
            writer.write_table(table.cast(schema))
    hints = get_type_hints(type(made))
    facts = {
        each.name: TypeAdapter(hints[each.name]).dump_python(getattr(made, each.name), mode="json")
        for each in fields(made)
        if each.name != "dataset"
    }
    tokens_sha256 = _file_sha256(path)
    written = {"facts": facts, "tokens_sha256": tokens_sha256, "sha256": _sha256_of(facts, tokens_sha256)}
    (folder / ENTRY_FILE).write_text(json.dumps(written) + "\n", encoding="utf-8")


def _sha256_of(facts: Any, tokens_sha256: str) -> str:
    return hashlib.sha256(json.dumps([facts, tokens_sha256], sort_keys=True).encode()).hexdigest()


def _write_failure(path: Path, error: UserError) -> None:
    """For those that wait: the same content would give them the same error, after the same time."""
    try:
        text = json.dumps({"attempt": secrets.token_hex(8), "message": str(error)})
        path.write_text(text, encoding="utf-8")
    except OSError:
        pass  # they find out by themselves


def _read_failure(path: Path) -> dict[str, str] | None:
    try:
        failure = json.loads(path.read_text(encoding="utf-8"))
        return {"attempt": str(failure["attempt"]), "message": str(failure["message"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
