"""What the ranks send in a micro batch, in how many messages, and that nothing waits for the device; what SM3,
estimation steps and events send besides.

    bytes sent per rank <= 2 gathers of the base + 20 (R - 1) / R bytes per active weight

values and indices are gathered in forward and in backward (4 + 4 bytes, twice), and the gradient is reduced (4).
Compact indices of 2 % take 1.15 bytes instead of 4. Of the other parts see docs/communication.md.
"""

from __future__ import annotations

import pytest
from communication_run import Case, Recorded, RecordedEvents, record_all, record_all_events
from ranks import run_ranks

CASES = [
    Case(quantization, gradient_checkpointing)
    for quantization in ("none", "nf4")
    for gradient_checkpointing in (False, True)
]
COMPACT = [Case("none", True, index_storage="compact"), Case("nf4", False, index_storage="compact")]
BY_MODULE = Case("none", gradient_checkpointing=True, by_block=False)
METHODS_WITH_EVENTS = [Case("none", False, method="sft_ag"), Case("nf4", True, method="sft_ma")]
HISTOGRAM_BYTES = 8 * 2**11
"""Of a round of the radix search, 2048 counts."""
ROUNDING_BYTES = 5000
"""Partitions are rounded up, and every dtype of a message begins aligned: 16 bytes each."""


def check(case: Case, recorded: Recorded, num_ranks: int) -> None:
    sent = recorded.gathered_bytes + recorded.reduced_bytes + recorded.other_bytes
    of_index = 1.17 if case.index_storage == "compact" else 4
    per_active = (12 + 2 * of_index) * (num_ranks - 1) / num_ranks
    assert recorded.other_bytes == 0
    assert sent <= 2 * recorded.base_bytes + per_active * recorded.num_active + ROUNDING_BYTES, case
    # Embedding and head are not sent again in backward, where nobody needs them: what is sent there is the blocks, with
    # their indices and values, and the gradients.
    assert recorded.gathered_in_backward_bytes <= recorded.block_bytes + ROUNDING_BYTES, case
    in_forward = recorded.base_bytes + (4 + of_index) * (num_ranks - 1) / num_ranks * recorded.num_active
    assert sent - recorded.gathered_in_backward_bytes - recorded.reduced_bytes <= in_forward + ROUNDING_BYTES, case
    stored = recorded.index_bytes / (num_ranks - 1) / recorded.num_active
    assert stored == pytest.approx(of_index / num_ranks, rel=0.05)
    # The gradients, once, in fp32: the ledger sees what is sent.
    least = 4 * (num_ranks - 1) / num_ranks * recorded.num_active
    assert least <= recorded.reduced_bytes <= least + ROUNDING_BYTES
    # A gather and a gather again, and a reduction: three messages a block; embedding, head, norm and the first block's
    # prefetch besides.
    assert recorded.num_collectives <= 3 * recorded.num_blocks + 6, f"{case}: {recorded.num_collectives}"
    assert recorded.step_collectives == ["allreduce_"], "more than the norm of the gradients"
    # transformers looks once whether the mask masks anything; neither this package nor DeepSpeed reads a number.
    assert [where for where in recorded.reads if "/transformers/masking_utils.py" not in where] == []
    assert recorded.waits == {"aten::is_nonzero": 1, "aten::item": 1, "aten::_local_scalar_dense": 1}


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_bytes_messages_and_waits_of_a_micro_batch(num_ranks: int) -> None:
    cases = [*CASES, *COMPACT, BY_MODULE] if num_ranks == 2 else CASES[1:3]
    of_ranks: list[list[Recorded]] = run_ranks(num_ranks, record_all, cases)
    for number, case in enumerate(cases):
        for recorded in (of_rank[number] for of_rank in of_ranks):
            if case.by_block:
                check(case, recorded, num_ranks)
            else:
                # Module by module the blocks are gathered a third time: the same count notices.
                assert recorded.gathered_in_backward_bytes > 1.4 * recorded.block_bytes
                assert recorded.num_collectives > 5 * recorded.num_blocks


def check_events(case: Case, recorded: RecordedEvents, num_ranks: int) -> None:
    parts = dict(recorded.parts)
    # A partition is rounded up to an even number of elements on every rank, in each list.
    num_linears = recorded.num_linears
    rounding = 16 * num_linears * num_ranks
    if case.method == "sft_ma":
        assert parts.pop("optimizer step") == [("allreduce_", 4 * recorded.num_lines)]
        gathered = 4 + 4 + 4  # values, birth steps, indices
    else:
        assert parts.pop("optimizer step") == []
        check_estimation(parts, recorded, num_ranks, rounding)
        # Values, two moments, birth steps, candidates with their sums of g and g^2, indices.
        gathered = 4 + 8 + 4 + 12 + 4
    # All of a tensor in one message with all other tensors'; then the comparison of the hashes: their sizes, and they.
    (name, num_bytes), *comparison = parts.pop("event")
    assert name == "_allgather_base_"
    assert num_bytes == pytest.approx(gathered * recorded.num_active / num_ranks, abs=8 * rounding / num_ranks)
    assert [name for name, _ in comparison] == ["allgather_", "allgather_"]
    assert sum(num_bytes for _, num_bytes in comparison) < 1000
    assert parts == {}


def check_estimation(
    parts: dict[str, list[tuple[str, int]]], recorded: RecordedEvents, num_ranks: int, rounding: int
) -> None:
    num_linears = recorded.num_linears
    # Once a phase: the dense gradient, a matrix (that fits into one tile) a message; then the choice for all together.
    first = by_name(parts.pop("first estimation step"))
    assert first.pop("_allgather_base_") == [8 * num_linears]
    assert sorted(first.pop("allreduce_")) == [8, *[HISTOGRAM_BYTES * num_linears] * 6]
    scattered = first.pop("_reduce_scatter_base_")
    assert len(scattered) == num_linears + 1 and not first
    expected = 4 * recorded.num_elements + 8 * recorded.num_active
    assert expected <= sum(scattered) <= expected + 2 * rounding
    # From then on nothing but the candidates: their indices once, their gradients once a step.
    second = by_name(parts.pop("second estimation step"))
    (gathered,) = second.pop("_allgather_base_")
    assert gathered * num_ranks == pytest.approx(4 * recorded.num_active, abs=rounding)
    (reduced,) = second["_reduce_scatter_base_"]
    assert reduced == pytest.approx(4 * recorded.num_active, abs=rounding)
    assert by_name(parts.pop("third estimation step")) == second


def by_name(entries: list[tuple[str, int]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for name, num_bytes in entries:
        found.setdefault(name, []).append(num_bytes)
    return found


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_bytes_and_messages_of_steps_and_events(num_ranks: int) -> None:
    of_ranks: list[list[RecordedEvents]] = run_ranks(num_ranks, record_all_events, METHODS_WITH_EVENTS)
    for number, case in enumerate(METHODS_WITH_EVENTS):
        for recorded in (of_rank[number] for of_rank in of_ranks):
            check_events(case, recorded, num_ranks)
