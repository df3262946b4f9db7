"""Peak memory and time of merging an adapter, beside peft's `merge_and_unload` on the same base and deltas.

    python scripts/bench_merge.py --folder /tmp/bench --size-gb 4 --json bench.json

Each merge is a process of its own; the two take turns for `--rounds` rounds, and every output is deleted before the
next begins. Base and adapter are random and made once in `--folder`; give it the disk that is to be measured, with room
for three times `--size-gb`.

    ours     `sparse_ds.export.merged.merge_adapter`: the base is streamed
    peft     `PeftModel.from_pretrained(base, supertuning adapter).merge_and_unload().save_pretrained`

Peak is the largest resident set of the whole process (`VmHWM`), Python and libraries included; `libraries` is what was
resident before the merge began. Prints a table in markdown; the exit code is 1 if our peak is above the largest
shard + 512 MiB. Last it counts how many of the deltas give another bf16 weight in peft's model, which adds
bf16(w) + bf16(value), than in ours, round(fp32 w + fp32 value). With `--switch` it also loads the base in plain
transformers and times `InPlaceAdapter.apply` and `.remove`, and compares every bit of the base before and after.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from llama_on_disk import LlamaShape, has_llama, shape_of_size, write_llama
from safetensors import safe_open

from sparse_ds.adapter.adapter import AdapterBase, AdapterConfig, Deltas
from sparse_ds.adapter.in_place import InPlaceAdapter
from sparse_ds.adapter.native import load_adapter, save_adapter
from sparse_ds.adapter.peft_formats.supertuning import save_supertuning
from sparse_ds.export.merged import merge_adapter
from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.selection.random_subset import random_subset

ALLOWED_ABOVE_SHARD_MIB = 512
VALUES_STD = 1e-3
SWITCHES = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for base, adapter and outputs")
    parser.add_argument("--size-gb", type=float, default=4.0, help="of the base, in GB of 1e9 bytes")
    parser.add_argument("--density", type=float, default=0.01, help="trained share of every matrix")
    parser.add_argument("--max-shard-size", default="2GB", help="of the outputs")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--switch", action="store_true", help="time an adapter switched on and off in a loaded model")
    parser.add_argument("--worker", choices=["ours", "peft", "switch"], help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    folder = arguments.folder
    if arguments.worker:
        worker = switch(folder) if arguments.worker == "switch" else merge(arguments.worker, folder, arguments)
        print(json.dumps(worker))
        return 0
    shape = shape_of_size(arguments.size_gb)
    if not has_llama(folder / "base", shape):
        write_llama(folder / "base", shape, shard_bytes=2_000_000_000)
    make_adapter(folder, shape, arguments.density)
    measured: dict[str, list[dict[str, Any]]] = {"ours": [], "peft": []}
    for number in range(arguments.rounds):
        for name in sorted(measured, reverse=bool(number % 2)):
            shutil.rmtree(folder / name, ignore_errors=True)
            measured[name].append(run_worker(name, arguments))
            if number < arguments.rounds - 1:
                shutil.rmtree(folder / name)
    largest_shard_mib = max(path.stat().st_size for path in (folder / "ours").glob("*.safetensors")) / 2**20
    num_other, num_deltas = count_other_weights(folder)
    for name in measured:
        shutil.rmtree(folder / name)
    exit_code = report(arguments, measured, largest_shard_mib, num_other / num_deltas)
    if arguments.switch:
        switched = run_worker("switch", arguments)
        print(
            f"\nin place, {switched['num_deltas']:,.0f} deltas: apply {switched['apply_s']:.2f} s, remove "
            f"{switched['remove_s']:.2f} s (medians of {switched['rounds']:.0f}), base "
            f"{'bit for bit as before' if switched['is_restored'] else 'CHANGED'}"
        )
        exit_code = exit_code if switched["is_restored"] else 1
    return exit_code


def run_worker(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own has measured."""
    words = ["--folder", str(arguments.folder), "--max-shard-size", arguments.max_shard_size, "--worker", name]
    ended = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return measured


def make_adapter(folder: Path, shape: LlamaShape, density: float) -> None:
    """A native adapter for all linear layers of the blocks, and the same for peft."""
    shapes = {
        name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
        for name, tensor in shape.empty_tensors().items()
        if ".layers." in name and tensor.dim() == 2
    }

    def deltas() -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for name, (rows, cols) in shapes.items():
            indices = random_subset(rows * cols, int(density * rows * cols), seed=0, name=name)
            yield name, indices, torch.randn(indices.numel(), generator=generator) * VALUES_STD

    base = AdapterBase(name=str(folder / "base"), quantization="none", dtype="bfloat16")
    config = AdapterConfig(method="sparta", density=density, base=base, shapes=shapes)
    save_adapter(folder / "adapter", deltas(), config=config, overwrite=True)
    save_supertuning(load_adapter(folder / "adapter"), folder / "adapter_peft", overwrite=True)


def peak_mib() -> float:
    """Of this process since its program began. (`ru_maxrss` begins with that of the process which started it.)"""
    (line,) = [text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("VmHWM")]
    return int(line.split()[1]) / 2**10


def switch(folder: Path) -> dict[str, float]:
    """The adapter applied to and removed from a loaded model, several times."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    before = checksum(model)
    adapter = InPlaceAdapter(model, load_adapter(folder / "adapter"))
    apply_s, remove_s = [], []
    for _ in range(SWITCHES):
        adapter.apply()
        assert checksum(model) != before
        adapter.remove()
        apply_s.append(adapter.apply_s)
        remove_s.append(adapter.remove_s)
    return {
        "num_deltas": sum(deltas.values.numel() for _, deltas in load_adapter(folder / "adapter").items()),
        "apply_s": statistics.median(apply_s),
        "remove_s": statistics.median(remove_s),
        "rounds": SWITCHES,
        "is_restored": checksum(model) == before,
    }


def checksum(model: torch.nn.Module) -> str:
    """sha256 of every byte of the parameters."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def merge(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """One merge in this process."""
    max_shard_size = arguments.max_shard_size
    libraries = peak_mib()
    if name == "peft":
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        libraries = peak_mib()
    begin = time.perf_counter()
    if name == "ours":
        merge_adapter(folder / "base", folder / "adapter", folder / "ours", max_shard_size=max_shard_size)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        merged = PeftModel.from_pretrained(model, folder / "adapter_peft").merge_and_unload()
        merged.save_pretrained(folder / "peft", max_shard_size=max_shard_size)
    for path in (folder / name).iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return {
        "wall_s": time.perf_counter() - begin,
        "peak_mib": peak_mib(),
        "libraries_mib": libraries,
    }


def count_other_weights(folder: Path) -> tuple[int, int]:
    """(deltas whose merged weights differ, all deltas)."""
    num_other = num_deltas = 0
    ours, peft = BaseCheckpoint(folder / "ours"), BaseCheckpoint(folder / "peft")
    with safe_open(folder / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        for name in load_adapter(folder / "adapter").config.shapes:
            deltas = Deltas(file.get_tensor(f"{name}.indices"), file.get_tensor(f"{name}.values"))
            left, right = (each.read(f"{name}.weight").view(-1)[deltas.indices] for each in (ours, peft))
            num_other += int((left != right).sum())
            num_deltas += deltas.values.numel()
    return num_other, num_deltas


def report(
    arguments: argparse.Namespace, measured: dict[str, list[dict[str, Any]]], largest_shard_mib: float, other: float
) -> int:
    allowed_mib = largest_shard_mib + ALLOWED_ABOVE_SHARD_MIB
    rows = {
        name: {
            "wall_s": statistics.median(run["wall_s"] for run in runs),
            "peak_mib": max(run["peak_mib"] for run in runs),
            "libraries_mib": max(run["libraries_mib"] for run in runs),
        }
        for name, runs in measured.items()
    }
    print(
        f"{arguments.size_gb:g} GB in bf16, density {arguments.density:g}, shards of {arguments.max_shard_size}, "
        f"{arguments.rounds} round(s), {os.cpu_count()} cores {platform.machine()}, torch {version('torch')}, "
        f"peft {version('peft')}, transformers {version('transformers')}\n"
    )
    print("| | s (median) | peak MiB | of these libraries |\n|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['wall_s']:.1f} | {row['peak_mib']:.0f} | {row['libraries_mib']:.0f} |")
    is_within = rows["ours"]["peak_mib"] <= allowed_mib
    print(
        f"\nlargest shard {largest_shard_mib:.0f} MiB + {ALLOWED_ABOVE_SHARD_MIB} MiB = {allowed_mib:.0f} MiB allowed: "
        f"{'kept' if is_within else 'EXCEEDED'}; {other:.2%} of the deltas give another bf16 weight in peft's model"
    )
    if arguments.json:
        content = {"rows": rows, "runs": measured, "largest_shard_mib": largest_shard_mib, "other_weights": other}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0 if is_within else 1


if __name__ == "__main__":
    sys.exit(main())
