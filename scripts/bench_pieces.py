"""What exchanged pieces save of a step of a frozen Llama: forward and input gradient, as far as sparse training needs
them, without any sparse layer, optimizer or ZeRO. The loss in chunks, which every run has, alone, and with
`train.compile` or `model.liger_kernels`.

python scripts/bench_pieces.py --hidden 1024 --layers 4 --tokens 2x512 --dtype bfloat16
python scripts/bench_pieces.py --device cuda --hidden 4096 --layers 4 --tokens 4x2048

The models run in turns; a row says the median and the least time of a step, and on CUDA the peak of memory above the
weights. Random weights; every token is trained.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from sparse_ds.config.errors import UserError
from sparse_ds.model.chunked_loss import chunked_head_loss
from sparse_ds.model.compiled_pieces import compiled_pieces
from sparse_ds.model.liger_pieces import liger_pieces
from sparse_ds.model.pieces import Pieces, eager_loss, install_pieces

HEAD_SIZE = 64
ORIGINAL_ROTARY = modeling_llama.apply_rotary_pos_emb


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--tokens", default="2x512", help="rows x tokens of a micro batch")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    rows, length = map(int, arguments.tokens.split("x"))
    # The rotary embedding is exchanged for the whole process: each model runs with the one that it was made with.
    steps = {name: Step(name, arguments, device) for name in ("eager", "loss in chunks", "compiled", "liger")}
    found = {name: step for name, step in steps.items() if step.model is not None}
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(rows, length, arguments.hidden, generator=generator)
    labels = torch.randint(0, arguments.vocabulary, (rows, length), generator=generator).to(device)
    losses = {}
    for number in range(arguments.rounds + 1):
        for name, step in found.items():
            losses[name] = step.run(embeddings, labels, is_counted=number > 0)
    records = [step.record(losses[name]) for name, step in found.items()]
    print_table(arguments, records)
    if arguments.json is not None:
        content = {**vars(arguments), "json": None, "torch": torch.__version__, "rows": records}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


class Step:
    """One model and the times of its steps."""

    def __init__(self, name: str, arguments: argparse.Namespace, device: torch.device) -> None:
        self.name, self.device = name, device
        self.model: Any = None
        self.times_s: list[float] = []
        self.peak_bytes = 0
        try:
            if name == "liger" and device.type != "cuda":
                raise UserError("they need a GPU")
            made: Pieces | None = None
            if name == "loss in chunks":
                made = Pieces(head_loss=chunked_head_loss(eager_loss))
            elif name != "eager":
                made = compiled_pieces(device) if name == "compiled" else liger_pieces()
        except UserError as error:
            print(f"{name}: left out ({error})")
            return
        hidden = arguments.hidden
        config = LlamaConfig(
            vocab_size=arguments.vocabulary,
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4 // 64 * 64,
            num_hidden_layers=arguments.layers,
            num_attention_heads=hidden // HEAD_SIZE,
            use_cache=False,
        )
        torch.manual_seed(0)
        with device:
            self.model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, arguments.dtype))
        self.model.requires_grad_(False).train()
        if made is not None:
            install_pieces(self.model, made)
        self.rotary = modeling_llama.apply_rotary_pos_emb
        modeling_llama.apply_rotary_pos_emb = ORIGINAL_ROTARY

    def run(self, embeddings: torch.Tensor, labels: torch.Tensor, *, is_counted: bool) -> float:
        modeling_llama.apply_rotary_pos_emb = self.rotary
        inputs = embeddings.to(self.device, self.model.dtype).requires_grad_()
        self._wait()
        before_bytes = 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before_bytes = torch.cuda.memory_allocated()
        begin = time.perf_counter()
        loss = self.model(inputs_embeds=inputs, labels=labels, num_items_in_batch=labels.numel()).loss
        loss.backward()
        self._wait()
        if is_counted:
            self.times_s.append(time.perf_counter() - begin)
            if self.device.type == "cuda":
                self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated() - before_bytes)
        return float(loss.detach())

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def record(self, loss: float) -> dict[str, Any]:
        median, least = statistics.median(self.times_s), min(self.times_s)
        return {
            "pieces": self.name,
            "median_ms": 1e3 * median,
            "least_ms": 1e3 * least,
            "peak_mib": self.peak_bytes / 2**20,
            "loss": loss,
        }


def print_table(arguments: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    print(
        f"\nhidden {arguments.hidden}, {arguments.layers} layers, vocabulary {arguments.vocabulary}, "
        f"{arguments.tokens} tokens, {arguments.dtype}, {arguments.device}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {arguments.rounds} rounds\n"
    )
    print("| pieces | step, ms (median) | least | share of eager (least) | peak, MiB | loss |")
    print("|---|---|---|---|---|---|")
    for record in records:
        peak = f"{record['peak_mib']:.0f}" if arguments.device == "cuda" else "-"
        share = record["least_ms"] / records[0]["least_ms"]
        print(
            f"| {record['pieces']} | {record['median_ms']:.1f} | {record['least_ms']:.1f} | {share:.2f} | {peak} | "
            f"{record['loss']:.5f} |"
        )


if __name__ == "__main__":
    main()
