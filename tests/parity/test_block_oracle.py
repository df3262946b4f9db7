"""Real runs whose active unit is a block of weights, against independent oracles on full matrices, in fp32.

The oracles are those of single weights (`dense_oracle`, `gradient_oracle`), but for every choice: what a block is worth
is the sum over its weights of a dense matrix of scores (|delta|, |gradient|, the outer product of SM3's accumulators),
added up weight by weight by the number of the block that each weight is in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from dense_oracle import DenseOracle, DenseTraining, Settings, Target, Trace, largest, smallest
from gradient_oracle import AdamMatrix, GradientOracle, GradientSettings
from numpy.typing import NDArray
from oracle_cases import Material, Start, event_keys, largest_difference, run_config
from tiny_llama_runs import FinishedRun, train_forked
from torch import Tensor

from sparse_ds.adapter.of_checkpoint import CheckpointAdapter
from sparse_ds.selection.random_subset import random_subset

DENSITY = 0.1
LOSS_TOLERANCE = 1e-5
# As in the tests of single weights: fp32 against fp64, values near 0 cancel.
VALUE_RTOL, VALUE_ATOL = 1e-5, 1e-6
MIN_GAP = 2e-4
"""No decision may hang on the rounding of scores (about 1e-5)."""

AG = GradientSettings(
    method="sft_ag",
    group_size=4,
    total_steps=20,
    global_batch_size=4,
    interval_steps=7,
    estimation_steps=2,
    initial_drop_fraction=0.5,
    drop_criterion="change",
    learning_rate=0.02,
    weight_decay=0.3,
    eps=None,
    max_grad_norm=1.02,
    warmup_fraction=0.1,
    eval_interval_steps=5,
    seed=14,
)
ACCUMULATED = dataclasses.replace(AG, method="accumulated_gradient", total_steps=8, drop_criterion="magnitude", seed=1)
MA = Settings(
    total_steps=18,
    global_batch_size=4,
    interval_steps=5,
    estimation_steps=2,
    initial_drop_fraction=0.5,
    learning_rate=0.05,
    weight_decay=0.3,
    momentum=0.5,
    eps=None,
    max_grad_norm=1.02,
    warmup_fraction=0.1,
    eval_interval_steps=4,
    seed=1,
)
SETTINGS = {"sft_ag": AG, "accumulated_gradient": ACCUMULATED, "sft_ma": MA}
BLOCKS = {"sft_ag": (2, 2), "accumulated_gradient": (1, 2), "sft_ma": (2, 1)}
NUM_EVENTS = {"sft_ag": 3, "accumulated_gradient": 1, "sft_ma": 4}


class Blocks:
    """Which weight of a matrix is in which block."""

    def __init__(self, shape: torch.Size, block: tuple[int, int]) -> None:
        rows, cols = np.indices(tuple(shape))
        self.number_of = (rows // block[0] * (shape[1] // block[1]) + cols // block[1]).reshape(-1)
        self.all = np.unique(self.number_of)

    def sums(self, scores: Tensor) -> NDArray[np.float64]:
        return np.bincount(self.number_of, weights=scores.numpy().reshape(-1))

    def weights_in(self, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.flatnonzero(np.isin(self.number_of, chosen))

    def holding(self, weights: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.unique(self.number_of[weights])


class BlockAdamMatrix(AdamMatrix):
    """`num_active` and `candidates` are blocks; what `drop_and_grow` returns, too."""

    def __init__(self, base: Tensor, initial_weights: Tensor, blocks: Blocks) -> None:
        super().__init__(base, initial_weights)
        self.blocks = blocks
        self.num_active = len(blocks.holding(self.indices))

    def choose_candidates(self, grad: Tensor, trace: Trace) -> None:
        self.candidates = largest(self.blocks.sums(grad.abs()), self.blocks.all, self.num_active, trace)
        self.sum_grad, self.sum_grad_sq = self.zeros(), self.zeros()

    def drop_and_grow(self, k: int, settings: GradientSettings, trace: Trace) -> int:
        reference = self.delta_at_event if settings.drop_criterion == "change" else torch.zeros_like(self.delta)
        scores, active = self.blocks.sums((self.delta - reference).abs()), self.blocks.holding(self.indices)
        for num_dropped in range(k, -1, -1):
            dropped = smallest(scores, active, num_dropped, trace)
            staying = np.setdiff1d(active, dropped)
            eligible = np.setdiff1d(self.candidates, staying)
            if len(eligible) >= num_dropped:
                break
        grown = largest(self.blocks.sums(self.sum_grad.abs()), eligible, num_dropped, trace)
        new = np.setdiff1d(grown, dropped)
        self._activate(self.blocks.weights_in(np.concatenate((staying, grown))))
        self._seed(self.blocks.weights_in(new), settings)
        self._keep_active(self.delta, self.exp_avg, self.exp_avg_sq, self.age)
        self.delta_at_event = self.delta.clone()
        return len(new)

    def replace_all(self, trace: Trace) -> None:
        chosen = largest(self.blocks.sums(self.sum_grad.abs()), self.blocks.all, self.num_active, trace)
        self._activate(self.blocks.weights_in(chosen))

    def _activate(self, positions: NDArray[np.int64]) -> None:
        assert len(self.blocks.holding(positions)) == self.num_active
        self.active = torch.zeros_like(self.active)
        self.active.view(-1)[torch.from_numpy(positions)] = True


class BlockTarget(Target):
    """`num_active` is blocks; what `drop_and_grow` returns, too."""

    def __init__(self, base: Tensor, initial_weights: Tensor, blocks: Blocks) -> None:
        super().__init__(base, initial_weights)
        self.blocks = blocks
        self.num_active = len(blocks.holding(self.indices))

    def drop_and_grow(self, k: int, trace: Trace) -> int:
        active = self.blocks.holding(self.indices)
        inactive = np.setdiff1d(self.blocks.all, active)
        k = min(k, len(inactive))
        dropped = smallest(self.blocks.sums(self.delta.abs()), active, k, trace)
        grown = largest(self.blocks.sums(torch.outer(self.row_max, self.col_max)), inactive, k, trace)
        self.active = torch.zeros_like(self.active)
        now_active = self.blocks.weights_in(np.concatenate((np.setdiff1d(active, dropped), grown)))
        self.active.view(-1)[torch.from_numpy(now_active)] = True
        self.delta, self.exp_avg = (torch.where(self.active, state, 0.0) for state in (self.delta, self.exp_avg))
        return k


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material.save(tmp_path_factory.mktemp("block_oracle"), model_seed=8)


def run_oracle(material: Material, method: str) -> DenseTraining:
    settings: Any = SETTINGS[method]
    start = Start.load(material, seed=settings.seed)
    matrices: dict[str, Any] = {}
    oracle_class: Any = DenseOracle if method == "sft_ma" else GradientOracle
    for name, base in start.bases.items():
        blocks = Blocks(base.shape, BLOCKS[method])
        drawn = random_subset(len(blocks.all), int(DENSITY * len(blocks.all)), seed=settings.seed, name=name)
        weights = torch.from_numpy(blocks.weights_in(drawn.numpy()))
        matrices[name] = (BlockTarget if method == "sft_ma" else BlockAdamMatrix)(base, weights, blocks)
    oracle: DenseTraining = oracle_class(
        start.model, start.bases, start.initial_indices, *material.samples["texts"], settings
    )
    oracle.targets = matrices
    oracle.run()
    return oracle


@pytest.fixture(scope="module")
def oracles(material: Material) -> dict[str, DenseTraining]:
    return {method: run_oracle(material, method) for method in SETTINGS}


@pytest.mark.parametrize("method", SETTINGS)
def test_the_comparison_of_blocks_means_something(method: str, oracles: dict[str, DenseTraining]) -> None:
    trace, settings = oracles[method].trace, SETTINGS[method]
    assert min(trace.gaps) > MIN_GAP
    assert len(trace.event_hashes) == len(set(trace.event_hashes.values())) == NUM_EVENTS[method]
    assert 0 < sum(norm > settings.max_grad_norm for norm in trace.grad_norms) < settings.total_steps
    assert abs(trace.heldout_losses[0] - trace.heldout_losses[-1]) > 0.01, "the run must have moved"


@pytest.mark.parametrize(
    ("method", "num_ranks", "checkpointing"),
    [
        ("sft_ag", 2, False),
        ("sft_ma", 2, False),
        pytest.param("accumulated_gradient", 1, False, marks=pytest.mark.slow),
        pytest.param("accumulated_gradient", 4, False, marks=pytest.mark.slow),
        pytest.param("sft_ag", 1, True, marks=pytest.mark.slow),
        pytest.param("sft_ag", 4, False, marks=pytest.mark.slow),
        pytest.param("sft_ma", 1, True, marks=pytest.mark.slow),
        pytest.param("sft_ma", 4, False, marks=pytest.mark.slow),
    ],
)
def test_a_run_with_blocks_follows_the_oracle(
    method: str, num_ranks: int, checkpointing: bool, material: Material, oracles: dict[str, DenseTraining]
) -> None:
    oracle, settings = oracles[method], SETTINGS[method]
    keys: dict[str, Any] = {"name": method, "block_size": list(BLOCKS[method]), "density": DENSITY}
    optimizer: dict[str, Any] = {}
    if isinstance(settings, Settings):
        keys |= event_keys(settings)
        optimizer = {"momentum": settings.momentum}
    elif settings.method == "sft_ag":
        keys |= {**event_keys(settings), "candidate_source": "step", "drop_criterion": settings.drop_criterion}
    else:
        keys |= {"estimation_steps": settings.estimation_steps}
    config = run_config(material.folder, settings, "texts", method=keys, optimizer=optimizer)
    config["train"]["gradient_checkpointing"] = checkpointing
    folder = material.folder / f"{method}-{num_ranks}"
    if num_ranks == 2:
        # In the middle of an estimation phase, and at the end.
        config["checkpoint"] = {"interval_steps": settings.total_steps // 2}
    result = train_forked(config, num_ranks, folder)
    check(result, oracle, settings)
    if num_ranks == 2:
        checkpoint = CheckpointAdapter(folder / "run" / f"checkpoint-{settings.total_steps}")
        for name, deltas in checkpoint.items():
            assert torch.equal(deltas.indices, result.indices[name]), "single weights, whatever the blocks"
            assert torch.equal(deltas.values, result.values[name])


def check(result: FinishedRun, oracle: DenseTraining, settings: Settings | GradientSettings) -> None:
    trace = oracle.trace
    assert result.event_hashes == trace.event_hashes
    assert largest_difference(result.steps("loss"), trace.losses) < LOSS_TOLERANCE
    assert largest_difference(result.heldout_losses, trace.heldout_losses) < LOSS_TOLERANCE
    first = settings.estimation_steps if getattr(settings, "selects_once", False) else 0
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
