"""The loss of a step is the mean over all trained tokens of its global batch, on 1, 2 and 4 ranks, padded and packed.

Real runs (ZeRO-3 on gloo, Trainer, method `full`) against one big batch: plain transformers on one process, one forward
pass a sample, the sum of all losses divided by the number of trained tokens, torch's AdamW. Samples have from 2 to 21
trained tokens, so that a mean of means would be another loss.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forks import train_in_forks
from safetensors.torch import load_file
from tiny_llama_runs import NUM_WORDS, Sample, save_samples, save_tiny_llama
from torch import Tensor
from transformers import LlamaForCausalLM

from sparse_ds.data.packing import pack
from sparse_ds.training.global_order import epoch_permutation

NUM_SAMPLES, ROW_LENGTH, NUM_STEPS, SEED, LEARNING_RATE = 64, 48, 3, 5, 0.01
PADDED, PACKED = 8, 4
"""Samples, or rows, of a global batch."""
TOLERANCE = 1e-5
"""fp32: some dozen roundings of 6e-8 in sums of losses of about 5."""


@dataclass(frozen=True)
class Layout:
    """Ranks x micro batch x accumulation = global batch."""

    num_ranks: int
    micro_batch_size: int
    is_packed: bool

    @property
    def global_batch_size(self) -> int:
        return PACKED if self.is_packed else PADDED


LAYOUTS = {
    "padded, 1 rank, 4 micro batches": Layout(1, 2, False),
    "padded, 2 ranks, 2 micro batches": Layout(2, 2, False),
    "padded, 4 ranks, 2 micro batches": Layout(4, 1, False),
    "packed, 1 rank, 2 micro batches": Layout(1, 2, True),
    "packed, 2 ranks, 2 micro batches": Layout(2, 1, True),
    "packed, 4 ranks": Layout(4, 1, True),
}


@dataclass(frozen=True)
class Outcome:
    """Of every step its loss and the norm of its gradient; the weights after the last."""

    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, Tensor]


def make_samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    samples = []
    for number in range(NUM_SAMPLES):
        length = 20 if number % 5 == 0 else number % 5
        words = torch.randint(0, NUM_WORDS, (3 + length,), generator=generator)
        samples.append(Sample(tuple(words.tolist()), num_prompt=3))
    return samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("token_mean")
    # Biases of keys hardly change the loss: their gradients would be mostly rounding.
    save_tiny_llama(folder / "model", seed=1, attention_bias=False)
    save_samples(make_samples(), folder / "train.jsonl")
    return folder


def train(folder: Path, name: str, layout: Layout) -> Outcome:
    """The run as a user starts it."""
    work = folder / name.replace(" ", "_")
    work.mkdir()
    config = {
        "model": {"name_or_path": str(folder / "model"), "quantization": "none", "dtype": "float32"},
        "data": {
            "train": str(folder / "train.jsonl"),
            "eval": None,
            "sequence_length": ROW_LENGTH,
            "packing": layout.is_packed,
        },
        "method": {"name": "full"},
        "optimizer": {
            "learning_rate": LEARNING_RATE,
            "max_grad_norm": 0.0,
            "schedule": "constant",
            "warmup_fraction": 0.0,
        },
        "train": {
            "output_dir": "run",
            "max_steps": NUM_STEPS,
            "micro_batch_size": layout.micro_batch_size,
            "global_batch_size": layout.global_batch_size,
            "seed": SEED,
            "device": "cpu",
            "cpu_threads": 1,
        },
        "export": {"merged_dtype": "float32"},
        "monitor": {"num_sample_prompts": 0, "progress_bar": False},
    }
    (work / "config.json").write_text(json.dumps(config), encoding="utf-8")
    ranks = train_in_forks([["--config", "config.json"]] * layout.num_ranks, [work] * layout.num_ranks)
    assert all(rank.exit_code == 0 for rank in ranks), [rank.stdout[-2000:] + rank.stderr[-4000:] for rank in ranks]
    records = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    weights = load_file(work / "run" / "merged" / "model.safetensors")
    return Outcome([step["loss"] for step in steps], [step["grad_norm"] for step in steps], weights)


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Outcome]:
    """Two at a time: ranks wait for each other much of the time."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        futures = {name: pool.submit(train, folder, name, layout) for name, layout in LAYOUTS.items()}
        return {name: future.result() for name, future in futures.items()}


def batches_of(is_packed: bool, samples: Sequence[Sample]) -> list[list[Sample]]:
    """The samples of every step."""
    order = epoch_permutation(len(samples), SEED, epoch=0)
    if not is_packed:
        return [[samples[i] for i in part] for part in order.split(PADDED)][:NUM_STEPS]
    packing = pack([len(sample.ids) for sample in samples], ROW_LENGTH, order.numpy())
    rows = epoch_permutation(len(packing), SEED, epoch=0).split(PACKED)
    return [[samples[i] for row in step for i in packing.samples_of(int(row))] for step in rows][:NUM_STEPS]


def losses_of(model: Any, sample: Sample) -> Tensor:
    """Negative log-likelihood of each trained token."""
    ids = torch.tensor(sample.ids)
    logits = model(ids[None]).logits[0]
    return F.cross_entropy(logits[sample.num_context - 1 : -1], ids[sample.num_context :], reduction="none")


def one_big_batch(folder: Path, is_packed: bool) -> Outcome:
    model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="eager").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    losses, grad_norms = [], []
    for batch in batches_of(is_packed, make_samples()):
        loss = torch.cat([losses_of(model, sample) for sample in batch]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        grad_norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])))
    return Outcome(losses, grad_norms, dict(model.named_parameters()))


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[bool, Outcome]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    outcomes = {is_packed: one_big_batch(folder, is_packed) for is_packed in (False, True)}
    torch.set_num_threads(threads)
    return outcomes


@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_and_micro_batches_add_up_to_one_big_batch(
    name: str, runs: dict[str, Outcome], expected: dict[bool, Outcome]
) -> None:
    run, oracle = runs[name], expected[LAYOUTS[name].is_packed]
    assert len(run.losses) == NUM_STEPS
    assert run.losses == pytest.approx(oracle.losses, rel=0, abs=TOLERANCE)
    assert run.grad_norms == pytest.approx(oracle.grad_norms, rel=TOLERANCE)
    for tensor, weight in oracle.weights.items():
        # AdamW divides by the root of the squared gradient, which for a gradient near 0 is mostly rounding.
        difference = (run.weights[tensor] - weight).abs()
        assert difference.mean() < TOLERANCE * LEARNING_RATE and difference.max() < 0.1 * LEARNING_RATE, tensor


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_mean_of_means_would_be_seen(is_packed: bool, folder: Path, expected: dict[bool, Outcome]) -> None:
    model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="eager")
    batch = batches_of(is_packed, make_samples())[0]
    with torch.no_grad():
        means = [float(losses_of(model, sample).mean()) for sample in batch]
    assert abs(sum(means) / len(means) - expected[is_packed].losses[0]) > 100 * TOLERANCE
