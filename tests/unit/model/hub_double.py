"""A hub in this process that the real huggingface_hub client talks to, and processes that ask it for a base model.

HubDouble    serves repositories from memory over HTTP and counts what is transferred
HubAskers    starts processes by forking one that has imported everything, so that each costs a fraction of a second
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[3]
SECONDS_TO_ANSWER = 60.0
"""Imports take most of it; what hangs must not hang the tests."""
PIDS = "pids: "

Files = dict[str, bytes]
T = TypeVar("T")


class HubDouble:
    """Repositories with a main branch, over HTTP on a port of this machine."""

    def __init__(self) -> None:
        self.commits: dict[tuple[str, str], Files] = {}
        """(name, commit) -> files."""
        self.branches: dict[str, str] = {}
        """Name -> commit of main."""
        self.is_down = False
        """Every answer is 503."""
        self.requests: list[str] = []
        """Method and path of every request about a repository."""
        self.transfers: Counter[str] = Counter()
        """`name/file` -> times that its content was asked for."""
        self.before_transfer: Callable[[str], Any] = lambda file: None
        """Called with `name/file` before its content is sent; may wait."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def push(self, name: str, files: Files) -> str:
        """A new commit of main; returns it."""
        commit = hashlib.sha1(repr((name, files)).encode()).hexdigest()
        self.commits[name, commit], self.branches[name] = files, commit
        return commit

    def reset(self) -> None:
        """Nothing was asked, and every answer comes at once."""
        self.is_down, self.before_transfer = False, lambda file: None
        self.requests.clear()
        self.transfers.clear()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubDouble
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        """api/models/OWNER/NAME[/revision/REV | /tree/REV] or OWNER/NAME/resolve/REV/FILE"""
        words = unquote(urlsplit(self.path).path).strip("/").split("/")
        if "/resolve/" in self.path or self.path.startswith("/api/models/"):
            self.hub.requests.append(f"{self.command} {self.path}")
        if self.hub.is_down:
            return self._send(503, b"down")
        if words[:2] == ["api", "models"] and len(words) >= 4:
            return self._describe("/".join(words[2:4]), words[4:])
        if words[2:3] == ["resolve"]:
            return self._transfer("/".join(words[:2]), words[3], "/".join(words[4:]))
        return self._send(404, b"")

    def _commit(self, name: str, revision: str) -> str | None:
        commit = self.hub.branches.get(name) if revision == "main" else revision
        return commit if (name, commit) in self.hub.commits else None

    def _describe(self, name: str, rest: list[str]) -> None:
        if name not in self.hub.branches:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        commit = self._commit(name, rest[1] if rest else "main")
        if commit is None:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = self.hub.commits[name, commit]
        if rest[:1] == ["tree"]:
            content: Any = [
                {"type": "file", "path": path, "size": len(data), "oid": _etag(data)} for path, data in files.items()
            ]
        else:
            content = {"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files]}
        return self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _transfer(self, name: str, revision: str, path: str) -> None:
        commit = self._commit(name, revision)
        if commit is None or path not in self.hub.commits[name, commit]:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = self.hub.commits[name, commit][path]
        if self.command == "GET":
            self.hub.transfers[f"{name}/{path}"] += 1
            self.hub.before_transfer(f"{name}/{path}")
        return self._send(200, data, {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": commit})

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        try:
            self.send_response(status)
            for key, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):  # who asked was killed
            self.close_connection = True


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@dataclass
class Asker:
    """A process that was asked for a base model."""

    pid: int
    log: Path

    @property
    def said(self) -> list[str]:
        """The lines of this project so far."""
        return [line for line in self.log.read_text().splitlines() if line.startswith("sparse_ds")]

    @cached_property
    def answer(self) -> dict[str, str]:
        """{"folder": ...} or {"error": ...}, waited for."""
        path = self.log.with_suffix(".json")
        wait_for(path.exists)
        answer: dict[str, str] = json.loads(path.read_text())
        return answer

    @property
    def folder(self) -> Path:
        assert "folder" in self.answer, (self.answer, self.log.read_text())
        return Path(self.answer["folder"])

    @property
    def error(self) -> str:
        assert "error" in self.answer, self.answer
        return self.answer["error"]


class HubAskers:
    """Starts processes that ask a hub.

    Args:
        url: of the hub.
        folder: for the cache and what the processes leave.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.cache = folder / "home" / "hub"
        self._logs = folder / "logs"
        self._logs.mkdir()
        self._num_asked = 0
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment = {
            **kept,
            "HF_ENDPOINT": url,
            "HF_HOME": str(folder / "home"),
            "NO_PROXY": "127.0.0.1",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "TQDM_DISABLE": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]),
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(
        self, name: str, revision: str | None = None, *, num: int = 1, offline: bool = False, heard: bool = True
    ) -> list[Asker]:
        """Processes that ask for a base model at the same time.

        Args:
            name: of the repository.
            revision: of it.
            num: how many.
            offline: with HF_HUB_OFFLINE=1.
            heard: everything that the processes say is in their logs; else what the command line shows of ranks
                4, 5, ... of a second machine.
        """
        logs = []
        for _ in range(num):
            logs.append(self._logs / f"{self._num_asked}.log")
            logs[-1].touch()
            self._num_asked += 1
        request = {"name": name, "revision": revision, "offline": offline, "heard": heard, "logs": [*map(str, logs)]}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(PIDS):
                pids = json.loads(line.removeprefix(PIDS))
                return [Asker(pid, log) for pid, log in zip(pids, logs, strict=True)]
        raise AssertionError(f"the process that starts the askers ended with {self._process.wait()}")

    def ask(self, name: str, revision: str | None = None, *, offline: bool = False) -> Asker:
        """One process that asks for a base model, when it has an answer."""
        (asker,) = self.start(name, revision, offline=offline)
        assert asker.answer
        return asker

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def wait_for(condition: Callable[[], T]) -> T:
    """The first true value of a condition."""
    deadline = time.monotonic() + SECONDS_TO_ANSWER
    while not (value := condition()):
        assert time.monotonic() < deadline, "nothing happened within the time limit"
        time.sleep(0.02)
    return value


def _serve_requests() -> None:
    """The process that starts askers: one line of JSON on stdin is one call of `HubAskers.start`."""
    import sparse_ds.cli
    import sparse_ds.model.find_base_model  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system buries the children
    for line in sys.stdin:
        request = json.loads(line)
        pids = []
        for local_rank, log in enumerate(request["logs"]):
            pid = os.fork()
            if pid == 0:
                _ask(request, local_rank, Path(log))
            pids.append(pid)
        print(f"{PIDS}{json.dumps(pids)}", flush=True)


def _ask(request: dict[str, Any], local_rank: int, log: Path) -> None:
    from huggingface_hub import constants

    from sparse_ds import cli
    from sparse_ds.config.errors import UserError
    from sparse_ds.model.find_base_model import find_base_model

    target = os.open(log, os.O_WRONLY)
    os.dup2(target, 1)
    os.dup2(target, 2)
    constants.HF_HUB_OFFLINE = request["offline"]  # read from the environment at import
    first_rank = 0 if request["heard"] else 4
    cli._set_up_logging(first_rank + local_rank, 0 if request["heard"] else local_rank)
    try:
        answer = {"folder": str(find_base_model(request["name"], request["revision"]))}
    except UserError as error:
        answer = {"error": str(error)}
    except BaseException as error:
        answer = {"defect": repr(error)}
    sys.stdout.flush()
    unfinished = log.with_suffix(".part")
    unfinished.write_text(json.dumps(answer))
    unfinished.rename(log.with_suffix(".json"))
    # As the ranks of a run, none ends before all have their answer: nothing is given back by the end of a process.
    wait_for(lambda: all(Path(other).with_suffix(".json").exists() for other in request["logs"]))
    os._exit(0)


if __name__ == "__main__":
    _serve_requests()
