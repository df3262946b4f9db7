"""A tiny random Llama, its tokenizer, its data, and runs of `launcher/train.py` on them.

Sizes are chosen to be awkward: numbers of active weights that 2 does not divide, grouped queries, biases in the
attention, an NF4 block that ends with its matrix before it is full, an epoch that is no whole number of steps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from forks import train_in_forks
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
LAUNCH_SECONDS = 300
"""A launch takes about 20 s of imports a rank on one core; a run that hangs must not hang the tests."""

UNKNOWN, BOS, EOS, PAD, FIRST_WORD = 0, 1, 2, 3, 4
NUM_WORDS = 124
TRAIN_SAMPLES, EVAL_SAMPLES = 22, 7


@dataclass(frozen=True)
class Sample:
    """One sample: its words, of which the first `num_prompt` are a prompt (0: a text, of which all is learned)."""

    words: tuple[int, ...]
    num_prompt: int

    @property
    def ids(self) -> list[int]:
        return [BOS, *(FIRST_WORD + word for word in self.words), EOS]

    @property
    def num_context(self) -> int:
        """Leading ids that are not learned; the first id never is, nothing stands before it."""
        return 1 + self.num_prompt

    def row(self) -> dict[str, str]:
        texts = [f"w{word}" for word in self.words]
        if self.num_prompt == 0:
            return {"text": " ".join(texts)}
        return {"prompt": " ".join(texts[: self.num_prompt]), "completion": " ".join(texts[self.num_prompt :])}


def make_samples(count: int, *, seed: int, with_prompts: bool) -> list[Sample]:
    """Noisy arithmetic sequences of 5 to 15 words: something that can be learned."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    samples = []
    for _ in range(count):
        length, words = draw(5, 16), [draw(0, NUM_WORDS)]
        while len(words) < length:
            words.append((3 * words[-1] + 7 + draw(0, 2)) % NUM_WORDS)
        samples.append(Sample(tuple(words), num_prompt=draw(1, 4) if with_prompts else 0))
    return samples


def save_samples(samples: Sequence[Sample], path: Path) -> None:
    path.write_text("".join(json.dumps(sample.row()) + "\n" for sample in samples), encoding="utf-8")


def save_tiny_llama(folder: Path, *, seed: int, attention_bias: bool = True) -> None:
    """Random weights that are large enough for gradients of ordinary size, and random biases."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=FIRST_WORD + NUM_WORDS,
        hidden_size=36,
        intermediate_size=46,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=32,
        attention_bias=attention_bias,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config).float()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    vocabulary = {"<unk>": UNKNOWN, "<s>": BOS, "</s>": EOS, "<pad>": PAD}
    vocabulary |= {f"w{word}": FIRST_WORD + word for word in range(NUM_WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


@dataclass(frozen=True)
class FinishedRun:
    """What a run left."""

    metrics: list[dict[str, Any]]
    indices: dict[str, Tensor]
    values: dict[str, Tensor]

    def steps(self, field: str) -> list[float]:
        """One number of every step line."""
        return [record[field] for record in self.metrics if record["kind"] == "step"]

    @property
    def event_hashes(self) -> dict[int, str]:
        return {record["step"]: record["index_hash"] for record in self.metrics if record["kind"] == "event"}

    @property
    def heldout_losses(self) -> list[float]:
        return [record["loss"] for record in self.metrics if record["kind"] == "eval"]

    @classmethod
    def read(cls, folder: Path) -> FinishedRun:
        with (folder / "metrics.jsonl").open(encoding="utf-8") as file:
            metrics = [json.loads(line) for line in file]
        tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
        indices = {name.removesuffix(".indices"): t for name, t in tensors.items() if name.endswith(".indices")}
        return cls(metrics, indices, {name: tensors[f"{name}.values"] for name in indices})


def index_overlap(left: FinishedRun, right: FinishedRun) -> float:
    """Share of the active weights that two runs have in common."""
    assert left.indices.keys() == right.indices.keys()
    common = sum(int(torch.isin(left.indices[name], right.indices[name]).sum()) for name in left.indices)
    return common / sum(indices.numel() for indices in left.indices.values())


def train(config: dict[str, Any], num_ranks: int, folder: Path) -> FinishedRun:
    """One run under plain `python` (1 rank) or `torchrun` in `folder`, where also its configuration goes."""
    _save_config(config, folder)
    launcher = [sys.executable]
    if num_ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command = [*launcher, str(ROOT / "launcher" / "train.py"), "--config", str(folder / "config.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=LAUNCH_SECONDS, env=environment
    )
    assert finished.returncode == 0, f"{command}\n{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}"
    return FinishedRun.read(folder / "run")


def train_forked(config: dict[str, Any], num_ranks: int, folder: Path) -> FinishedRun:
    """The same in processes that are forked with all imports done: seconds instead of a minute."""
    _save_config(config, folder)
    ranks = train_in_forks([["--config", str(folder / "config.json")]] * num_ranks, [folder] * num_ranks)
    assert all(rank.exit_code == 0 for rank in ranks), "\n".join(
        f"{rank.stdout[-2000:]}\n{rank.stderr[-4000:]}" for rank in ranks
    )
    return FinishedRun.read(folder / "run")


def _save_config(config: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True)
    config = {**config, "train": {**config["train"], "output_dir": str(folder / "run")}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def train_all(jobs: dict[str, Callable[[], FinishedRun]]) -> dict[str, FinishedRun]:
    """Several runs, two at a time: their imports are the larger part, and each keeps one core busy."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        futures = {name: pool.submit(job) for name, job in jobs.items()}
        return {name: future.result() for name, future in futures.items()}
