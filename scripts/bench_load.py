"""What loading a 4-bit base costs each rank: bytes read, seconds and peak memory, next to other ways to load it.

    python scripts/bench_load.py --folder /data/bench_load --json bench_load.json

A checkpoint of Llama shape with random weights (bf16, in shards) is written into the folder once. Then 1, 2 and 4 ranks
(processes of one gloo group, all on this machine's CPU) load it, each time in fresh processes, the loaders in turn:

    ours            what a run does: `prepare_model`, target weights in NF4
    transformers    `AutoModelForCausalLM.from_pretrained` in 4 bit in every rank. A job under ZeRO-3 does just that:
                    transformers partitions no model that it quantizes, so every rank holds all of it
    whole tensors   every rank reads each tensor whole, quantizes it whole and keeps its slice (written out below)
    ours, from NF4  (with --quantized) ours from a checkpoint that `sparse-ds quantize` has made of the same weights

How it is measured, per rank:

    bytes read  ours: counted by the checkpoint, and what the kernel counted for the process (rchar) beside it. The
                others map the files, of which rchar sees nothing: the bytes of the tensors that safetensors handed out
                (transformers leaves those that stay in 16 bit mapped, to be read when they are first used)
    seconds     from a barrier until the rank has its model; imports and a first load of the embedded model come before
    held        bytes of all tensors that the rank keeps (its partitions; of transformers, the whole model)
    peak        highest resident memory (VmHWM, reset just before) minus the resident memory just before; with the pages
                of mapped files, which the kernel could take back. Beside it the peak of anonymous memory alone, sampled

A row shows the worst rank, the median over the repeats. What ours and `whole tensors` hold is compared byte by byte.
The script ends with exit code 1 if on any rank of any run of ours

    bytes read (by either count) > 1.1 * payload of the checkpoint / ranks, or
    peak > held + 1.2 * largest tensor of the checkpoint, or
    a partition differs from that of `whole tensors`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
import transformers
from llama_on_disk import INDEX_FILE, has_llama, shape_of_size, write_llama
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from sparse_ds.config import load_config
from sparse_ds.distributed import process_group
from sparse_ds.distributed.born_partitioned import PartitionedParameters, slice_of
from sparse_ds.distributed.zero3_partitions import local_partition
from sparse_ds.embedded import resolve_model
from sparse_ds.model.base_checkpoint import SAFETENSORS, BaseCheckpoint
from sparse_ds.training.setup import prepare_model

DENSITY = 0.001
"""Of the sparse weights in our rows: next to nothing beside the base."""
SAMPLE_INTERVAL_S = 0.005
MAX_READ, MAX_PEAK = 1.1, 1.2
"""The bounds of the module docstring: share of payload / ranks, and of the largest tensor beside the partition."""
MIB = 2**20


# ------------------------------------------------------------------------------------------------ the checkpoint


@dataclass(frozen=True)
class Payload:
    """Sizes of a checkpoint, from the headers of its files."""

    size_bytes: int
    largest_tensor_bytes: int
    num_files: int


def payload_of(folder: Path) -> Payload:
    files = sorted(folder.glob("*.safetensors"))
    sizes = []
    for path in files:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        sizes += [entry["data_offsets"][1] - entry["data_offsets"][0] for key, entry in header.items() if key[0] != "_"]
    return Payload(sum(sizes), max(sizes), len(files))


def quantize(folder: Path, output: Path, *, double: bool) -> None:
    """`sparse-ds quantize`, once."""
    if (output / "config.json").is_file():
        return
    options = ["--double-quantization"] if double else []
    command = [sys.executable, "-m", "sparse_ds.cli", "quantize", str(folder), str(output), *options]
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit(f"failed: {' '.join(command)}")


# ------------------------------------------------------------------------------------------------ loaders, in a rank


@dataclass
class Loaded:
    """What a loader made. Keeps the model alive until it has been measured."""

    model: Any
    tensors: dict[str, Tensor]
    """All that the rank keeps, by name."""
    num_bytes_read: int
    base: dict[str, Any] | None = None
    """The partitioned parameters without the deltas, by name; None where nothing is partitioned."""


def load_ours(folder: Path, double: bool) -> Loaded:
    overrides = {
        "model.name_or_path": folder,
        "model.quantization": "nf4",
        "model.double_quantization": json.dumps(double),
        "method.density": DENSITY,
    }
    config = load_config("zero3_sft_ma", [f"{key}={value}" for key, value in overrides.items()])
    checkpoint = BaseCheckpoint(folder)
    prepared = prepare_model(config, checkpoint, torch.device("cpu"))
    parameters = dict(prepared.model.named_parameters())
    base = {name: each for name, each in parameters.items() if name.rpartition(".")[2] not in ("indices", "values")}
    return Loaded(
        prepared.model,
        {name: each.ds_tensor for name, each in parameters.items()},
        checkpoint.bytes_read,
        base,
    )


def load_whole_tensors(folder: Path, double: bool) -> Loaded:
    """Every rank reads and quantizes everything; with our loader it shares the making of partitions only."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    targets = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }
    index = folder / INDEX_FILE
    file_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}
    partitioned, held, num_bytes = PartitionedParameters(), {}, 0
    for name, _ in model.named_parameters():
        with safe_open(folder / file_of.get(name, SAFETENSORS), framework="pt") as file:
            full = file.get_tensor(name)
        num_bytes += full.nbytes
        if not bool(torch.isfinite(full).all()):
            raise ValueError(f"{name} holds NaN or Inf")
        kept = {"weight": full}
        if name in targets:
            packed, state = bnb.quantize_4bit(full, blocksize=64, compress_statistics=double, quant_type="nf4")
            kept = {"packed": packed.reshape(-1), "absmax": state.absmax}
            if double:
                kept["nested_statistics"] = torch.cat([state.state2.absmax, state.offset.reshape(1)])
            del packed, state
        for kind, tensor in kept.items():
            held[f"{name.rpartition('.')[0]}.{kind}"] = partitioned.make(
                tuple(tensor.shape), tensor.dtype, slice_of(tensor), requires_grad=False
            )
        del full, kept, tensor
    return Loaded(model, {name: each.ds_tensor for name, each in held.items()}, num_bytes, held)


def load_with_transformers(folder: Path, double: bool) -> Loaded:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with counting_safe_open() as count:
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.bfloat16)
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[name] = parameter.data
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            tensors[f"{name}.absmax"] = state.absmax
            if state.nested:
                tensors[f"{name}.nested_absmax"] = state.state2.absmax
    return Loaded(model, tensors, count.num_bytes)


@dataclass
class Count:
    """Bytes of the tensors that were handed out."""

    num_bytes: int = 0
    lock: Any = field(default_factory=threading.Lock)


class _CountedSlice:
    """A safetensors slice that counts what is taken from it."""

    def __init__(self, inner: Any, count: Count) -> None:
        self._inner, self._count = inner, count

    def __getitem__(self, where: Any) -> Tensor:
        tensor: Tensor = self._inner[where]
        with self._count.lock:
            self._count.num_bytes += tensor.nbytes
        return tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _CountedFile:
    """A file opened with safetensors, as far as transformers uses it."""

    def __init__(self, inner: Any, count: Count) -> None:
        self._inner, self._count = inner, count

    def get_slice(self, name: str) -> _CountedSlice:
        return _CountedSlice(self._inner.get_slice(name), self._count)

    def __exit__(self, *reason: Any) -> None:
        self._inner.__exit__(*reason)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@contextmanager
def counting_safe_open() -> Iterator[Count]:
    """Count what transformers' loader takes from safetensors files (its threads included)."""
    count, original = Count(), transformers.modeling_utils.safe_open
    transformers.modeling_utils.safe_open = lambda *args, **options: _CountedFile(original(*args, **options), count)
    try:
        yield count
    finally:
        transformers.modeling_utils.safe_open = original


def digest_of(parameters: dict[str, Any]) -> str:
    """Of names and bytes of the real elements (no padding) of this rank's partitions."""
    digest = hashlib.sha256()
    for name in sorted(parameters):
        digest.update(name.encode())
        digest.update(local_partition(parameters[name]).view(torch.uint8).numpy())
    return digest.hexdigest()


LOADERS: dict[str, Callable[[Path, bool], Loaded]] = {
    "ours": load_ours,
    "transformers": load_with_transformers,
    "whole tensors": load_whole_tensors,
    "ours, from NF4": load_ours,
}


# ------------------------------------------------------------------------------------------------ measuring, in a rank


@dataclass(frozen=True)
class Task:
    """What the ranks of one run do."""

    loader: str
    folder: str
    double_quantization: bool


@dataclass(frozen=True)
class Measurement:
    """What one rank found. Peaks are growths since just before."""

    rank: int
    num_bytes_read: int
    kernel_bytes_read: int
    disk_bytes_read: int
    seconds: float
    held_bytes: int
    peak_bytes: int
    anonymous_peak_bytes: int
    digest: str | None


class _AnonymousPeak(threading.Thread):
    """Samples the anonymous memory of this process until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = memory_bytes("RssAnon")
        self.num_bytes_read = 0
        """Of /proc, which the kernel counts too."""
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(SAMPLE_INTERVAL_S):
            status = Path("/proc/self/status").read_text(encoding="utf-8")
            self.num_bytes_read += len(status)
            self.peak_bytes = max(self.peak_bytes, 1024 * _number_in(status, "RssAnon"))

    def stop(self) -> int:
        self._done.set()
        self.join()
        return self.peak_bytes


def memory_bytes(key: str) -> int:
    """One of the memory lines of /proc/self/status."""
    return 1024 * _number_in(Path("/proc/self/status").read_text(encoding="utf-8"), key)


def io_bytes(key: str) -> int:
    """One of the counters of /proc/self/io."""
    return _number_in(Path("/proc/self/io").read_text(encoding="utf-8"), key)


def _number_in(text: str, key: str) -> int:
    for line in text.splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc has no {key} here; this script needs Linux")


def be_rank(task: Task, result: Path) -> None:
    """Body of one rank's process."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    process_group.start("cpu")
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // process_group.world_size()))
    load = LOADERS[task.loader]
    load(Path(resolve_model("embedded")), task.double_quantization)
    measurement = measure(lambda: load(Path(task.folder), task.double_quantization))
    if task.loader == "whole tensors" and task.double_quantization and torch.get_num_threads() > 1:
        # The offset of double quantization is a mean, whose last digits depend on the number of threads; ours is always
        # that of one thread. So what is compared is loaded again.
        torch.set_num_threads(1)
        measurement = replace(measurement, digest=digest_of(load(Path(task.folder), True).base or {}))
    result.write_text(json.dumps(asdict(measurement)), encoding="utf-8")
    process_group.stop()


def measure(load: Callable[[], Loaded]) -> Measurement:
    """Collectives: one barrier; every rank must call it."""
    gc.collect()
    # Memory that malloc keeps from the imports would be used again, and not be seen as growth.
    ctypes.CDLL(None).malloc_trim(0)
    torch.distributed.barrier()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM = VmRSS
    resident, anonymous = memory_bytes("VmRSS"), memory_bytes("RssAnon")
    sampler = _AnonymousPeak()
    sampler.start()
    kernel, disk = (io_bytes(key) for key in ("rchar", "read_bytes"))
    begin = time.perf_counter()
    loaded = load()
    seconds = time.perf_counter() - begin
    kernel_after, disk_after = (io_bytes(key) for key in ("rchar", "read_bytes"))
    anonymous_peak, peak = sampler.stop(), memory_bytes("VmHWM")
    return Measurement(
        rank=process_group.rank(),
        num_bytes_read=loaded.num_bytes_read,
        kernel_bytes_read=kernel_after - kernel - sampler.num_bytes_read,
        disk_bytes_read=disk_after - disk,
        seconds=seconds,
        held_bytes=sum(tensor.nbytes for tensor in loaded.tensors.values()),
        peak_bytes=peak - resident,
        anonymous_peak_bytes=anonymous_peak - anonymous,
        digest=None if loaded.base is None else digest_of(loaded.base),
    )


# ------------------------------------------------------------------------------------------------ all runs


@dataclass(frozen=True)
class Run:
    """One loader on some ranks, once."""

    task: Task
    num_ranks: int
    repeat: int
    payload: Payload
    ranks: list[Measurement]

    @property
    def is_ours(self) -> bool:
        return self.task.loader.startswith("ours")

    def worst(self, key: str) -> Any:
        """The largest of the ranks' numbers."""
        return max(getattr(rank, key) for rank in self.ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoint is, or is made (default: one that is removed)"
    )
    parser.add_argument(
        "--size-gb", type=float, default=2.2, help="of the checkpoint (default: 2.2, TinyLlama's shape)"
    )
    parser.add_argument("--shard-mb", type=int, default=500, help="largest file of the checkpoint")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--double-quantization", choices=["off", "on", "both"], default="both")
    parser.add_argument("--loaders", nargs="+", choices=list(LOADERS)[:3], default=list(LOADERS)[:3])
    parser.add_argument("--quantized", action="store_true", help="also ours from an NF4 checkpoint, made first")
    parser.add_argument("--drop-caches", action="store_true", help="drop the files from the page cache before each run")
    parser.add_argument("--timeout-s", type=float, default=1800, help="for the ranks of one run")
    parser.add_argument("--json", type=Path, help="write every measurement there")
    parser.add_argument("--be-rank", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.be_rank:
        task, result = arguments.be_rank
        be_rank(Task(**json.loads(task)), Path(result))
        return
    with nullcontext(arguments.folder) if arguments.folder else tempfile.TemporaryDirectory() as folder:
        problems = bench(arguments, Path(folder))
    for problem in problems:
        print(f"broken: {problem}")
    sys.exit(1 if problems else 0)


def bench(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Everything; returns what was broken."""
    shape = shape_of_size(arguments.size_gb)
    model = folder / "bfloat16"
    if not has_llama(model, shape):
        say(f"writing {model}")
        write_llama(model, shape, shard_bytes=arguments.shard_mb * 10**6)
    doubles = {"off": [False], "on": [True], "both": [False, True]}[arguments.double_quantization]
    tasks = {double: [Task(loader, str(model), double) for loader in arguments.loaders] for double in doubles}
    if arguments.quantized:
        for double in doubles:
            output = folder / ("nf4_double" if double else "nf4")
            quantize(model, output, double=double)
            tasks[double].append(Task("ours, from NF4", str(output), double))
    for each in {task.folder for group in tasks.values() for task in group}:
        warm(Path(each))
    runs = []
    for repeat in range(arguments.repeats):
        for double in doubles:
            for num_ranks in arguments.ranks:
                for task in tasks[double]:
                    if arguments.drop_caches:
                        drop_from_cache(Path(task.folder))
                    ranks = run_ranks(task, num_ranks, arguments.timeout_s)
                    runs.append(Run(task, num_ranks, repeat, payload_of(Path(task.folder)), ranks))
                    say(describe(runs[-1]))
    problems = [problem for run in runs for problem in broken_bounds(run)] + different_partitions(runs)
    cache = "dropped before each run" if arguments.drop_caches else "warm"
    facts = {
        "machine": machine(),
        "versions": versions(),
        "checkpoint": {**shape._asdict(), **asdict(payload_of(model))},
        "page_cache": cache,
    }
    print(report(facts, runs, arguments.repeats))
    if arguments.json:
        content = {**facts, "runs": [asdict(run) for run in runs], "problems": problems}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return problems


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def warm(folder: Path) -> None:
    """Read all weights once, into the page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(2**24):
                pass


def drop_from_cache(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def run_ranks(task: Task, num_ranks: int, timeout_s: float) -> list[Measurement]:
    """Start the ranks of one run and wait for what they find.

    Raises:
        SystemExit: a rank failed; with the end of its output.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder, processes = Path(name), []
        for rank in range(num_ranks):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num_ranks),
                "LOCAL_WORLD_SIZE": str(num_ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "DS_ACCELERATOR": "cpu",
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_WAIT_POLICY": "passive",
            }
            command = [sys.executable, __file__, "--be-rank", json.dumps(asdict(task)), str(folder / f"{rank}.json")]
            with (folder / f"{rank}.log").open("wb") as log:
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        try:
            _wait_for(processes, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        failed = [rank for rank, process in enumerate(processes) if process.returncode != 0]
        if failed:
            # Others were only ended: the one that failed by itself has something to say.
            rank = min(failed, key=lambda rank: processes[rank].returncode < 0)
            log_text = (folder / f"{rank}.log").read_text(encoding="utf-8", errors="replace")
            raise SystemExit(
                f"{task}, rank {rank} of {num_ranks}: code {processes[rank].returncode}\n{log_text[-4000:]}"
            )
        results = [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(num_ranks)]
    return [Measurement(**result) for result in results]


def _wait_for(processes: list[subprocess.Popen[bytes]], deadline: float) -> None:
    """Until all have ended, or one has failed, or time is up."""
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if any(codes) or None not in codes:
            return
        time.sleep(0.1)


def broken_bounds(run: Run) -> list[str]:
    """One line for every bound that a rank of a run of ours broke."""
    if not run.is_ours:
        return []
    problems = []
    max_read = MAX_READ * run.payload.size_bytes / run.num_ranks
    for rank in run.ranks:
        max_peak = rank.held_bytes + MAX_PEAK * run.payload.largest_tensor_bytes
        what = f"{run.task.loader}, double quantization {on_or_off(run)}, rank {rank.rank} of {run.num_ranks}:"
        for count, num_bytes in (("counted", rank.num_bytes_read), ("kernel", rank.kernel_bytes_read)):
            if num_bytes > max_read:
                problems.append(
                    f"{what} read {num_bytes / MIB:.1f} MiB ({count}), more than {MAX_READ} / {run.num_ranks} of the "
                    f"payload = {max_read / MIB:.1f} MiB"
                )
        if rank.peak_bytes > max_peak:
            problems.append(
                f"{what} peak {rank.peak_bytes / MIB:.1f} MiB, more than the partition {rank.held_bytes / MIB:.1f} MiB "
                f"+ {MAX_PEAK} x the largest tensor = {max_peak / MIB:.1f} MiB"
            )
    return problems


def different_partitions(runs: list[Run]) -> list[str]:
    """One line for every run of ours that holds other bytes than `whole tensors` on as many ranks."""
    references = {
        (run.num_ranks, run.task.double_quantization): [rank.digest for rank in run.ranks]
        for run in runs
        if run.task.loader == "whole tensors"
    }
    problems = []
    for run in runs:
        reference = references.get((run.num_ranks, run.task.double_quantization))
        if run.is_ours and reference is not None and [rank.digest for rank in run.ranks] != reference:
            problems.append(
                f"{run.task.loader}, double quantization {on_or_off(run)}, {run.num_ranks} ranks: the partitions "
                "differ from those of `whole tensors`"
            )
    return problems


def on_or_off(run: Run) -> str:
    return "on" if run.task.double_quantization else "off"


def describe(run: Run) -> str:
    """One line for the one who waits."""
    return (
        f"double quantization {on_or_off(run)}, {run.num_ranks} rank(s), {run.task.loader}: "
        f"{run.worst('seconds'):.1f} s, read {run.worst('num_bytes_read') / MIB:.0f} MiB, "
        f"peak {run.worst('peak_bytes') / MIB:.0f} MiB"
    )


# ------------------------------------------------------------------------------------------------ report


def report(facts: dict[str, Any], runs: list[Run], repeats: int) -> str:
    """Markdown."""
    checkpoint = facts["checkpoint"]
    lines = [
        f"{facts['machine']}; {', '.join(f'{name} {version}' for name, version in facts['versions'].items())}",
        "",
        f"{checkpoint['size_bytes'] / MIB:.0f} MiB of bf16 weights in {checkpoint['num_files']} files "
        f"({checkpoint['layers']} layers, hidden {checkpoint['hidden']}), largest tensor "
        f"{checkpoint['largest_tensor_bytes'] / MIB:.1f} MiB; page cache {facts['page_cache']}; the worst rank, median "
        f"of {repeats}. Sizes in MiB.",
        "",
        "| double quantization | ranks | loader | bytes read | of the file | by the kernel | from disk, all ranks "
        "| seconds | held | peak | anonymous peak |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    rows: dict[tuple[bool, int, str], list[Run]] = {}
    for run in runs:
        rows.setdefault((run.task.double_quantization, run.num_ranks, run.task.loader), []).append(run)
    for (_, num_ranks, loader), group in rows.items():
        read = statistics.median(run.worst("num_bytes_read") for run in group)
        kernel = statistics.median(run.worst("kernel_bytes_read") for run in group)
        disk = statistics.median(sum(rank.disk_bytes_read for rank in run.ranks) for run in group)
        seconds = statistics.median(run.worst("seconds") for run in group)
        sizes = [
            f"{statistics.median(run.worst(key) for run in group) / MIB:.0f}"
            for key in ("held_bytes", "peak_bytes", "anonymous_peak_bytes")
        ]
        lines.append(
            f"| {on_or_off(group[0])} | {num_ranks} | {loader} | {read / MIB:.1f} | "
            f"{100 * read / group[0].payload.size_bytes:.1f} % | {kernel / MIB:.1f} | {disk / MIB:.0f} | "
            f"{seconds:.2f} | {' | '.join(sizes)} |"
        )
    return "\n".join(lines)


def machine() -> str:
    """Processor, cores that may be used, memory, kernel."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    memory_gib = _number_in(Path("/proc/meminfo").read_text(encoding="utf-8"), "MemTotal") / 2**20
    processor = names[0] if names else platform.machine()
    return f"{processor}, {len(os.sched_getaffinity(0))} cores, {memory_gib:.0f} GiB, Linux {platform.release()}"


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "bitsandbytes", "deepspeed", "safetensors")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


if __name__ == "__main__":
    main()
