"""Size and time of a checkpoint beside those of DeepSpeed's own `engine.save_checkpoint`, on one and the same run.

    torchrun --nproc_per_node 2 scripts/bench_checkpoint.py --config zero3_sft_ag --set model.quantization=none
    torchrun --nproc_per_node 2 scripts/bench_checkpoint.py --hidden 1024 --layers 8 --json bench.json

After each of `--rounds` steps of a real run all writers save the same state, one after the other, in an order that
rotates from round to round; the first round is not counted. A writer's files are deleted before the next one begins.

    returns     until training could go on
    on disk     until every byte has been flushed (fsync); `engine.save_checkpoint` leaves that to the system, so its
                files are flushed here

With `--hidden` the base is a random Llama of that size, made in a temporary folder. Prints a table in markdown:
medians, and the fastest and slowest round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Before torch is imported: see sparse_ds/cli.py.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "cuda" not in sys.argv:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sparse_ds.config import load_config
from sparse_ds.distributed import process_group
from sparse_ds.distributed.launch_environment import complete_environment
from sparse_ds.distributed.watchdog import Watchdog
from sparse_ds.embedded import resolve_model
from sparse_ds.model.find_base_model import find_base_model
from sparse_ds.training.checkpointing import RunCheckpoints
from sparse_ds.training.engine_state import EngineState
from sparse_ds.training.output_folder import OutputFolder
from sparse_ds.training.run import _Training
from sparse_ds.training.stop_signals import StopSignals

FOREGROUND, BACKGROUND = "sparse_ds", "sparse_ds, `checkpoint.background`"
EVERYTHING, TRAINABLE = "`engine.save_checkpoint`", "the same, `exclude_frozen_parameters`"
HEAD_SIZE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="zero3_sft_ag", help="as for launcher/train.py")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=6, help="steps, each followed by one save of every writer")
    parser.add_argument("--hidden", type=int, help="hidden size of a random base; the default is the config's base")
    parser.add_argument("--layers", type=int, default=4, help="of the random base")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--folder", type=Path, help="where to write (on the disk to be measured); else a temporary one")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    # DeepSpeed calls collectives by names that torch has begun to rename.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*is deprecated")
    launch = complete_environment(os.environ)
    process_group.start(arguments.device)
    device = torch.device("cuda", launch.local_rank) if arguments.device == "cuda" else torch.device("cpu")
    work = Path(process_group.from_rank_0("making a folder", lambda: tempfile.mkdtemp(dir=arguments.folder)))
    try:
        settings = [
            f"train.max_steps={arguments.rounds}",
            f"train.output_dir={json.dumps(str(work / 'run'))}",
            "checkpoint.interval_steps=1",
            "export.merged=false",
            "monitor.progress_bar=false",
            "monitor.num_sample_prompts=0",
            "data.eval=null",
            *arguments.set,
        ]
        if arguments.hidden is not None:
            process_group.from_rank_0("making a base", lambda: make_base(work, arguments.hidden, arguments.layers))
            settings += [f"model.name_or_path={json.dumps(str(work / 'base'))}"]
        config = load_config(arguments.config, settings)
        base = find_base_model(config.model.name_or_path, config.model.revision)
        # Neither watched nor stopped by signals: both would do something between the measured saves.
        watchdog = Watchdog(launch.rank, launch.world_size, stall_timeout_s=None)
        signals = StopSignals(launch.rank, launch.launcher)
        run = MeasuredRun(config, launch, OutputFolder(config.train.output_dir), base, device, watchdog, signals)
        run.carry_out()
        if launch.rank == 0:
            report(run, launch.world_size, arguments)
    finally:
        process_group.stop()
        if launch.rank == 0:
            shutil.rmtree(work, ignore_errors=True)


def make_base(work: Path, hidden: int, num_layers: int) -> None:
    """A random bf16 Llama with the embedded model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("embedded"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4 // 64 * 64,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden // HEAD_SIZE,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(work / "base")
    tokenizer.save_pretrained(work / "base")


class MeasuredRun(_Training):
    """A run that after each step saves once with each writer."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.returns_s: dict[str, list[float]] = {}
        self.on_disk_s: dict[str, list[float]] = {}
        self.size_bytes: dict[str, int] = {}
        self.num_rounds = 0

    @property
    def num_active(self) -> int:
        return sum(layer.num_active for layer in self.prepared.layers.values())

    def _bind(self, total_steps: int) -> None:
        super()._bind(total_steps)
        engine = EngineState(
            self.prepared.layers,
            self.prepared.dense_parameters,
            self.master,
            self.trainer.deepspeed.optimizer.optimizer,
            self.weight_states,
            self.estimation,
        )
        self.ours: dict[bool, RunCheckpoints] = {}
        for background in (False, True):
            settings = self.config.checkpoint.model_copy(update={"background": background})
            folder = self.output.path / f"ours-{background}"
            self.ours[background] = RunCheckpoints(settings, self.identity, folder, engine, self.progress)

    def _save_checkpoint(self) -> None:
        writers: list[tuple[str, Callable[[], Path]]] = [
            (FOREGROUND, lambda: self._write_ours(background=False)),
            (BACKGROUND, lambda: self._write_ours(background=True)),
            (EVERYTHING, lambda: self._write_deepspeed(exclude_frozen=False)),
            (TRAINABLE, lambda: self._write_deepspeed(exclude_frozen=True)),
        ]
        shift = self.num_rounds % len(writers)
        for name, write in [*writers[shift:], *writers[:shift]]:
            os.sync()
            torch.distributed.barrier()
            begin = time.perf_counter()
            folder = write()
            torch.distributed.barrier()
            returned_s = time.perf_counter() - begin
            self.ours[True].finish()
            if self.is_main:
                for path in folder.rglob("*"):
                    flush(path)
            torch.distributed.barrier()
            if self.num_rounds:
                self.returns_s.setdefault(name, []).append(returned_s)
                self.on_disk_s.setdefault(name, []).append(time.perf_counter() - begin)
            if self.is_main:
                self.size_bytes[name] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                shutil.rmtree(folder)
        self.num_rounds += 1

    def _write_ours(self, *, background: bool) -> Path:
        self.ours[background].save(self.report.to_state())
        return self.output.path / f"ours-{background}"

    def _write_deepspeed(self, *, exclude_frozen: bool) -> Path:
        folder = self.output.path / "deepspeed"
        self.trainer.deepspeed.save_checkpoint(str(folder), exclude_frozen_parameters=exclude_frozen)
        return folder


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def report(run: MeasuredRun, num_ranks: int, arguments: argparse.Namespace) -> None:
    print(
        f"\n{run.config.method.name}, {run.num_active:,} active of {run.prepared.num_weights:,} weights, base "
        f"{run.config.model.quantization}/{run.config.model.dtype}, {num_ranks} rank(s), {arguments.device}, "
        f"{run.num_rounds - 1} rounds\n"
    )
    print("| writer | size, MB | bytes per active weight | returns, s | on disk, s |")
    print("|---|---|---|---|---|")
    for name, size in run.size_bytes.items():
        print(
            f"| {name} | {size / 1e6:.2f} | {size / run.num_active:.1f} | {spread(run.returns_s[name])} | "
            f"{spread(run.on_disk_s[name])} |"
        )
    if arguments.json is not None:
        content = {
            "method": run.config.method.name,
            "num_active": run.num_active,
            "num_weights": run.prepared.num_weights,
            "num_ranks": num_ranks,
            "device": arguments.device,
            "size_bytes": run.size_bytes,
            "returns_s": run.returns_s,
            "on_disk_s": run.on_disk_s,
        }
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})"


if __name__ == "__main__":
    main()
