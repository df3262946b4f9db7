"""Real runs of SFT-AG, SpaRTA, Fisher and accumulated gradients against an independent oracle on full matrices.

The same settings in several divisions of the step's samples over ranks and micro batches: all must do what the one
oracle does. As in `test_dense_oracle`, evaluations fall on steps before, with and after events.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from dense_oracle import Trace
from gradient_oracle import AdamMatrix, GradientOracle, GradientSettings
from oracle_cases import DENSITY, Material, Start, event_keys, largest_difference, run_config
from tiny_llama_runs import FinishedRun, train_forked

MODEL_SEED = 8
LOSS_TOLERANCE = 1e-5
# A run in fp32 against fp64. Values near 0 are sums of terms of up to the learning rate (0.02), and cancel: 3e-7 was
# measured, and 2e-8 for the smaller values of the runs in bf16.
VALUE_RTOL, VALUE_ATOL = 1e-5, 1e-6
# Two right implementations may choose differently where two scores are closer than their rounding. Here none is: the
# smallest relative distance at any decision must be far above what scores of the two differ by (about 1e-6).
MIN_GAP = 2e-4
# In bf16 base + delta is rounded: no weight may be so near to the middle of two bf16 numbers that the 2e-8 decide. One
# that is rounded to the other side changes losses by 1e-4, and from then on decisions.
MIN_ROUNDING_GAP = 2e-7

STEP = GradientSettings(
    method="sft_ag",
    group_size=4,
    total_steps=40,
    global_batch_size=4,
    interval_steps=8,
    estimation_steps=3,
    initial_drop_fraction=0.5,
    learning_rate=0.02,
    weight_decay=0.3,
    eps=None,
    max_grad_norm=0.8,
    warmup_fraction=0.1,
    eval_interval_steps=5,
    seed=58,
)
MICRO_BATCH = dataclasses.replace(
    STEP,
    group_size=2,
    total_steps=24,
    interval_steps=7,
    estimation_steps=2,
    drop_schedule="constant",
    betas=(0.8, 0.95),
    max_grad_norm=1.0,
    eval_interval_steps=4,
    seed=37,
)
NF4 = dataclasses.replace(
    STEP,
    total_steps=25,
    interval_steps=6,
    estimation_steps=2,
    drop_schedule="cosine",
    drop_criterion="change",
    max_grad_norm=1.0,
    eval_interval_steps=4,
    seed=20,
)
# Few weights and steps, so that there is a seed with no weight near a rounding boundary (`MIN_ROUNDING_GAP`).
BF16 = dataclasses.replace(
    STEP,
    total_steps=13,
    interval_steps=4,
    estimation_steps=2,
    learning_rate=0.01,
    max_grad_norm=0.4,
    eval_interval_steps=4,
    seed=226,
)
# A bf16 gradient of one sample has many equal entries.
BF16_TIES = dataclasses.replace(BF16, group_size=1, seed=16)
SPARTA = dataclasses.replace(STEP, method="sparta", total_steps=20, betas=(0.8, 0.95))
FISHER = dataclasses.replace(STEP, method="fisher", group_size=1, total_steps=12, seed=4)
# Over other bases.
SPARTA_NF4 = dataclasses.replace(SPARTA, learning_rate=0.05)
SPARTA_BF16 = dataclasses.replace(BF16, method="sparta", total_steps=6, max_grad_norm=0.3, seed=167)
FISHER_NF4 = dataclasses.replace(FISHER, seed=2)
FISHER_BF16 = dataclasses.replace(BF16, method="fisher", group_size=1, total_steps=5, max_grad_norm=0.3, seed=140)
ACCUMULATED = dataclasses.replace(STEP, method="accumulated_gradient", total_steps=12, seed=3)


class Case(NamedTuple):
    """What an oracle and the runs that are compared with it have in common."""

    settings: GradientSettings
    data: str = "texts"
    quantization: str = "none"
    dtype: str = "float32"
    density: float = DENSITY


CASES = {
    "step": Case(STEP),
    "micro_batch": Case(MICRO_BATCH, "prompts"),
    "nf4": Case(NF4, "prompts", quantization="nf4"),
    "bf16": Case(BF16, dtype="bfloat16", density=0.01),
    "bf16 ties": Case(BF16_TIES, "prompts", dtype="bfloat16", density=0.01),
    "sparta": Case(SPARTA),
    "sparta nf4": Case(SPARTA_NF4, "prompts", quantization="nf4"),
    "sparta bf16": Case(SPARTA_BF16, dtype="bfloat16", density=0.01),
    "fisher": Case(FISHER),
    "fisher nf4": Case(FISHER_NF4, "prompts", quantization="nf4"),
    "fisher bf16": Case(FISHER_BF16, dtype="bfloat16", density=0.01),
    "accumulated_gradient": Case(ACCUMULATED, "prompts"),
}


@dataclass(frozen=True)
class Division:
    """Of the 4 samples of a step: `num_ranks` x `micro_batch_size`, and what is left of 4 is accumulated."""

    num_ranks: int
    micro_batch_size: int
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of the configuration, by section."""


CHECKPOINTING = {"train": {"gradient_checkpointing": True}}
# Small parameters (24 and 49 values) then stay gathered: events must reach them too.
PERSISTENT = {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 60}}}
RUNS = {
    "step": {
        "1 x 1": Division(1, 1),
        "1 x 4": Division(1, 4),
        "2 x 1": Division(2, 1, PERSISTENT),
        "4 x 1": Division(4, 1),
        "checkpointing": Division(1, 1, CHECKPOINTING),
    },
    # Micro batch x ranks = 2, so that the first micro batches of all ranks are the same samples.
    "micro_batch": {
        "1 x 2": Division(1, 2),
        "2 x 1": Division(2, 1),
        "checkpointing": Division(1, 2, CHECKPOINTING),
    },
    "nf4": {"1 x 1": Division(1, 1)},
    "bf16": {"1 x 1": Division(1, 1)},
    "bf16 ties": {"1 x 1": Division(1, 1)},
    "sparta": {"1 x 1": Division(1, 1), "2 x 2": Division(2, 2), "checkpointing": Division(1, 4, CHECKPOINTING)},
    "sparta nf4": {"1 x 1": Division(1, 1)},
    "sparta bf16": {"1 x 1": Division(1, 1)},
    # The squares are those of micro batches of one sample.
    "fisher": {"1 x 1": Division(1, 1), "2 x 1": Division(2, 1), "checkpointing": Division(1, 1, CHECKPOINTING)},
    "fisher nf4": {"1 x 1": Division(1, 1)},
    "fisher bf16": {"1 x 1": Division(1, 1)},
    "accumulated_gradient": {"1 x 1": Division(1, 1), "1 x 4": Division(1, 4)},
}
# What these show is shown by cheaper runs too, for another method or source.
SLOW = {
    ("step", "2 x 1"),
    ("step", "4 x 1"),
    ("step", "checkpointing"),
    ("sparta", "2 x 2"),
    ("sparta", "checkpointing"),
    ("fisher", "checkpointing"),
    ("accumulated_gradient", "1 x 4"),
}
NAMES = [
    pytest.param(name, run, marks=[pytest.mark.slow] if (name, run) in SLOW else [])
    for name, divisions in RUNS.items()
    for run in divisions
]


def gradient_config(materials: dict[str, Material], name: str, run: str) -> dict[str, Any]:
    """The configuration of one run."""
    case, division = CASES[name], RUNS[name][run]
    settings = case.settings
    method: dict[str, Any] = {"name": settings.method}
    if settings.method == "sft_ag":
        method |= event_keys(settings)
        method |= {"drop_schedule": settings.drop_schedule, "drop_criterion": settings.drop_criterion}
        method["candidate_source"] = "step" if settings.group_size == settings.global_batch_size else "micro_batch"
    elif settings.selects_once:
        method["estimation_steps"] = settings.estimation_steps
    config = run_config(
        materials[case.dtype].folder,
        settings,
        case.data,
        method=method,
        optimizer={"betas": settings.betas, "moments": "float32"},
        quantization=case.quantization,
        dtype=case.dtype,
        density=case.density,
        micro_batch_size=division.micro_batch_size,
    )
    if case.dtype == "bfloat16":
        config["model"]["attention"] = "eager"  # as the oracle's: others round elsewhere
    return config | {section: {**config.get(section, {}), **keys} for section, keys in division.changes.items()}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Material]:
    """By dtype; the model for bf16 has no biases."""
    folder = tmp_path_factory.mktemp("gradient_oracle")
    return {
        "float32": Material.save(folder / "float32", model_seed=MODEL_SEED),
        "bfloat16": Material.save(folder / "bfloat16", model_seed=MODEL_SEED, attention_bias=False),
    }


class Runs:
    """The runs of this file, each made when it is first asked for."""

    def __init__(self, materials: dict[str, Material], folder: Path) -> None:
        self._materials, self._folder = materials, folder
        self._finished: dict[tuple[str, str], FinishedRun] = {}

    def __getitem__(self, key: tuple[str, str]) -> FinishedRun:
        if key not in self._finished:
            name, run = key
            config = gradient_config(self._materials, name, run)
            folder = self._folder / f"{name}, {run}"
            self._finished[key] = train_forked(config, RUNS[name][run].num_ranks, folder)
        return self._finished[key]


@pytest.fixture(scope="module")
def runs(materials: dict[str, Material], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(materials, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def oracles(materials: dict[str, Material]) -> dict[str, GradientOracle]:
    """All oracles of this file, after their run."""
    return {name: run_oracle(materials, case) for name, case in CASES.items()}


def run_oracle(materials: dict[str, Material], case: Case) -> GradientOracle:
    material, settings = materials[case.dtype], case.settings
    dtype, nf4 = getattr(torch, case.dtype), case.quantization == "nf4"
    start = Start.load(material, seed=settings.seed, nf4=nf4, dtype=dtype, density=case.density)
    oracle = GradientOracle(start.model, start.bases, start.initial_indices, *material.samples[case.data], settings)
    oracle.run()
    return oracle


@pytest.mark.parametrize("name", CASES)
def test_the_comparison_means_something(name: str, oracles: dict[str, GradientOracle]) -> None:
    """The oracle's own run exercises what it is to check, and no decision of it hangs on rounding."""
    oracle, settings = oracles[name], CASES[name].settings
    trace = oracle.trace
    assert all(gap > MIN_GAP for gap in trace.gaps)
    assert all(gap > MIN_ROUNDING_GAP for gap in oracle.rounding_gaps)
    assert bool(oracle.rounding_gaps) == (CASES[name].dtype == "bfloat16")
    num_events = {"sft_ag": 3, "sparta": 0}.get(settings.method, 1)
    assert len(trace.event_hashes) == len(set(trace.event_hashes.values())) >= num_events
    assert len(trace.gaps) >= num_events * len(oracle.targets)
    if settings.method == "sft_ag":
        assert all(count > 0 for count in oracle.num_new.values())
        assert sum(trace.num_replaced.values()) > sum(oracle.num_new.values()), "some weights should be kept"
    if name == "bf16 ties":
        assert trace.num_tied > 4, "ties decided by index should occur"
    clipped = sum(norm > settings.max_grad_norm for norm in trace.grad_norms)
    assert 0 < clipped < settings.total_steps
    assert abs(trace.heldout_losses[0] - trace.heldout_losses[-1]) > 0.01, "the run must have moved"
    assert max(float(target.delta.abs().max()) for target in oracle.targets.values()) > settings.learning_rate


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("micro_batch", {"group_size": 4}),
        ("micro_batch", {"betas": (0.9, 0.999)}),
        ("nf4", {"drop_criterion": "magnitude"}),
        ("fisher", {"group_size": 2}),
        ("fisher", {"method": "accumulated_gradient"}),
    ],
)
def test_each_setting_matters(
    name: str, changes: dict[str, Any], materials: dict[str, Material], oracles: dict[str, GradientOracle]
) -> None:
    """A run that took another value for one of these would not pass as the right one."""
    case = CASES[name]
    other = run_oracle(materials, case._replace(settings=dataclasses.replace(case.settings, **changes)))
    assert other.trace.event_hashes != oracles[name].trace.event_hashes


@pytest.mark.parametrize("method", ["sparta", "sft_ag"])
def test_with_all_weights_active_the_oracle_is_torch_adamw(method: str, materials: dict[str, Material]) -> None:
    """At density 1 the dropped weights are the only candidates that may be grown, so nothing ever changes."""
    settings = dataclasses.replace(
        STEP, method=method, total_steps=12, interval_steps=4, betas=(0.8, 0.95), max_grad_norm=2.9
    )
    oracle = run_oracle(materials, Case(settings, density=1.0))
    trace = oracle.trace
    assert 0 < sum(norm > settings.max_grad_norm for norm in trace.grad_norms) < settings.total_steps
    deltas = {name: matrix.zeros().requires_grad_() for name, matrix in oracle.targets.items()}
    adamw = torch.optim.AdamW(
        deltas.values(), betas=settings.betas, eps=1e-8, weight_decay=settings.weight_decay, foreach=False
    )
    order = oracle._order_of_samples()
    for step, lr in enumerate(trace.learning_rates):
        weights = {f"{name}.weight": (m.base + deltas[name]).float() for name, m in oracle.targets.items()}
        samples = [oracle.train[i] for i in order[4 * step : 4 * step + 4]]
        losses, num_tokens = [], 0
        for sample in samples:
            ids = torch.tensor([sample.ids])
            logits = torch.func.functional_call(oracle.model, weights, kwargs={"input_ids": ids}).logits
            losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
            num_tokens += ids.numel() - 1
        loss = torch.stack(losses).sum() / num_tokens
        assert abs(loss.item() - trace.losses[step]) < LOSS_TOLERANCE
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(deltas.values(), settings.max_grad_norm)
        adamw.param_groups[0]["lr"] = lr
        adamw.step()
    for name, matrix in oracle.targets.items():
        torch.testing.assert_close(matrix.delta, deltas[name].detach(), rtol=VALUE_RTOL, atol=1e-6)


def test_a_grown_weight_of_the_oracle_moves_by_the_learning_rate_under_a_constant_gradient() -> None:
    """By the seeds of its state and age; a weight that is dropped and grown stays as it is; ties go by index."""
    grad = torch.tensor([[0.5, 0.0, -0.25], [2.0, 0.25, 1.0]], dtype=torch.float64)
    settings = dataclasses.replace(STEP, weight_decay=0.0, estimation_steps=3, eps=1e-15)
    matrix = AdamMatrix(torch.zeros(2, 3), torch.tensor([0, 1, 4]))
    matrix.delta[0, 0], matrix.age[0, 0] = 0.125, 7.0
    matrix.choose_candidates(grad, Trace())
    assert sorted(matrix.candidates) == [0, 3, 5]
    for _ in range(3):
        matrix.estimate(grad)
    assert matrix.drop_and_grow(3, settings, Trace()) == 2
    assert matrix.indices.tolist() == [0, 3, 5]
    assert matrix.delta.tolist() == [[0.125, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert matrix.age.tolist() == [[7.0, 0.0, 0.0], [3.0, 0.0, 3.0]]
    matrix.adamw_step(grad, 0.01, settings)
    torch.testing.assert_close(matrix.delta[1], torch.tensor([-0.01, 0.0, -0.01], dtype=torch.float64))


@pytest.mark.parametrize(("name", "run"), NAMES)
def test_a_run_follows_the_oracle(name: str, run: str, runs: Runs, oracles: dict[str, GradientOracle]) -> None:
    """At every event the same index sets, and all numbers up to rounding, in every division of the samples."""
    oracle, settings, result = oracles[name], CASES[name].settings, runs[name, run]
    trace = oracle.trace
    assert result.event_hashes == trace.event_hashes
    assert len(result.steps("loss")) == settings.total_steps
    assert largest_difference(result.steps("loss"), trace.losses) < LOSS_TOLERANCE
    assert largest_difference(result.heldout_losses, trace.heldout_losses) < LOSS_TOLERANCE
    assert largest_difference(result.steps("lr"), trace.learning_rates) < 1e-12
    # Of steps that only measure there is nothing to clip.
    first = settings.estimation_steps if settings.selects_once else 0
    torch.testing.assert_close(
        torch.tensor(result.steps("grad_norm")[first:]), torch.tensor(trace.grad_norms[first:]), rtol=1e-5, atol=0.0
    )
    assert result.indices.keys() == oracle.targets.keys()
    for module, matrix in oracle.targets.items():
        assert result.indices[module].tolist() == matrix.indices.tolist(), module
        torch.testing.assert_close(
            result.values[module],
            matrix.values,
            rtol=VALUE_RTOL,
            atol=VALUE_ATOL,
            msg=lambda text, m=module: f"{m}: {text}",
        )
