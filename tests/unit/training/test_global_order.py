"""The same samples in the same steps on any number of ranks."""

from __future__ import annotations

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from sparse_ds.config.errors import UserError
from sparse_ds.training.global_order import GlobalOrderSampler

NUM_SAMPLES, GLOBAL_BATCH_SIZE = 53, 12


def samples_of_steps(num_ranks: int, micro_batch_size: int, epoch: int = 0, seed: int = 7) -> list[set[int]]:
    """What all ranks together see in each step, dealt by accelerate as Trainer has it dealt."""
    accumulation = GLOBAL_BATCH_SIZE // (num_ranks * micro_batch_size)
    by_rank = []
    for rank in range(num_ranks):
        sampler = GlobalOrderSampler(NUM_SAMPLES, GLOBAL_BATCH_SIZE, seed)
        sampler.set_epoch(epoch)
        batches = BatchSampler(sampler, micro_batch_size, drop_last=False)
        by_rank.append(list(BatchSamplerShard(batches, num_ranks, rank, split_batches=False, even_batches=True)))
    num_steps = len(by_rank[0]) // accumulation
    assert all(len(batches) == num_steps * accumulation for batches in by_rank)
    steps = []
    for step in range(num_steps):
        of_step = [batches[step * accumulation + i] for batches in by_rank for i in range(accumulation)]
        samples = [sample for batch in of_step for sample in batch]
        assert len(samples) == GLOBAL_BATCH_SIZE
        steps.append(set(samples))
    return steps


@pytest.mark.parametrize(
    ("num_ranks", "micro_batch_size"), [(1, 1), (1, 4), (2, 2), (2, 6), (3, 2), (4, 3), (6, 1), (12, 1)]
)
def test_steps_see_the_same_samples_on_any_number_of_ranks(num_ranks: int, micro_batch_size: int) -> None:
    expected = samples_of_steps(1, GLOBAL_BATCH_SIZE)
    assert samples_of_steps(num_ranks, micro_batch_size) == expected
    assert all(len(step) == GLOBAL_BATCH_SIZE for step in expected), "a sample came twice in one step"


def test_an_epoch_sees_every_sample_at_most_once_in_whole_batches() -> None:
    sampler = GlobalOrderSampler(NUM_SAMPLES, GLOBAL_BATCH_SIZE, seed=0)
    order = list(sampler)
    assert len(order) == len(sampler) == 48
    assert len(set(order)) == 48 and set(order) <= set(range(NUM_SAMPLES))


def test_epochs_and_seeds_have_orders_of_their_own_and_repeat() -> None:
    orders = {
        (seed, epoch): tuple(sorted(s) for s in samples_of_steps(1, 12, epoch, seed))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len({str(order) for order in orders.values()}) == 4
    assert tuple(sorted(s) for s in samples_of_steps(1, 12, epoch=1, seed=1)) == orders[1, 1]


def test_the_largest_seed_of_the_config_works() -> None:
    sampler = GlobalOrderSampler(4, 2, seed=2**32 - 1)
    sampler.set_epoch(10**6)
    assert sorted(sampler) == [0, 1, 2, 3]


def test_fewer_samples_than_one_global_batch_is_a_user_error() -> None:
    assert len(GlobalOrderSampler(12, 12, seed=0)) == 12
    with pytest.raises(
        UserError, match=r"data\.train: got 11 usable samples, expected at least one global batch of 12"
    ):
        GlobalOrderSampler(11, 12, seed=0)
