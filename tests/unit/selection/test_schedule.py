"""Events and replaced counts against a literal reading of the schedule."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_ds.selection.schedule import is_event, num_to_replace

PAPER = {"interval_steps": 20, "estimation_steps": 5}


def test_events_of_the_defaults() -> None:
    assert [step for step in range(1, 70) if is_event(step, **PAPER)] == [5, 25, 45, 65]


@given(gamma=st.integers(1, 6), extra=st.integers(1, 9), total=st.integers(1, 80))
def test_events_are_gamma_then_every_s(gamma: int, extra: int, total: int) -> None:
    interval = gamma + extra
    literal, step = [], gamma
    while step <= total:
        literal.append(step)
        step += interval
    sizes = {"interval_steps": interval, "estimation_steps": gamma}
    assert [t for t in range(1, total + 1) if is_event(t, **sizes)] == literal


def test_first_event_replaces_all_then_linear_to_zero() -> None:
    counts = [
        num_to_replace(t, num_active=1000, total_steps=105, initial_drop_fraction=0.2, **PAPER) for t in range(1, 106)
    ]
    expected = {5: 1000, 25: 152, 45: 114, 65: 76, 85: 38, 105: 0}  # floor(0.2 * (1 - t / 105) * 1000)
    assert {t: k for t, k in enumerate(counts, start=1) if t in expected} == expected
    assert sum(counts) == sum(expected.values())


@given(
    hundredths=st.integers(0, 100), event=st.integers(1, 20), num_active=st.integers(0, 10**9), rest=st.integers(0, 50)
)
def test_floor_is_exact(hundredths: int, event: int, num_active: int, rest: int) -> None:
    step = 5 + 20 * event
    total = step + rest
    counted = num_to_replace(
        step, num_active=num_active, total_steps=total, initial_drop_fraction=hundredths / 100, **PAPER
    )
    assert counted == hundredths * (total - step) * num_active // (100 * total)


@pytest.mark.parametrize(("fraction", "exact"), [(0.3, 90), (0.29, 87), (0.7, 210)])
def test_floor_survives_float_noise(fraction: float, exact: int) -> None:
    assert int(fraction * (1 - 25 / 100) * 400) == exact - 1, "plain floats do not fail here: choose another case"
    assert num_to_replace(25, num_active=400, total_steps=100, initial_drop_fraction=fraction, **PAPER) == exact


@pytest.mark.parametrize(
    ("drop_schedule", "expected"),
    [
        ("linear", {5: 1000, 25: 152, 45: 114, 65: 76, 85: 38, 105: 0}),
        ("constant", {5: 1000, 25: 200, 45: 200, 65: 200, 85: 200, 105: 200}),
        # 100 * (1 + cos(pi * t / 105)), by hand with t / 105 = 5/21, 9/21, 13/21, 17/21, 1
        ("cosine", {5: 1000, 25: 173, 45: 122, 65: 63, 85: 17, 105: 0}),
    ],
)
def test_counts_of_every_drop_schedule(drop_schedule: str, expected: dict[int, int]) -> None:
    counts = {
        t: num_to_replace(
            t,
            num_active=1000,
            total_steps=105,
            initial_drop_fraction=0.2,
            drop_schedule=drop_schedule,
            **PAPER,
        )
        for t in range(1, 106)
    }
    assert {t: k for t, k in counts.items() if k or t in expected} == expected


@given(hundredths=st.integers(0, 100), event=st.integers(1, 20), num_active=st.integers(0, 10**9))
def test_constant_is_exact(hundredths: int, event: int, num_active: int) -> None:
    counted = num_to_replace(
        5 + 20 * event,
        num_active=num_active,
        total_steps=1000,
        initial_drop_fraction=hundredths / 100,
        drop_schedule="constant",
        **PAPER,
    )
    assert counted == hundredths * num_active // 100


@given(fraction=st.floats(0, 1), event=st.integers(1, 20), num_active=st.integers(0, 10**6), rest=st.integers(0, 50))
def test_cosine_is_the_formula(fraction: float, event: int, num_active: int, rest: int) -> None:
    step = 5 + 20 * event
    total = step + rest
    counted = num_to_replace(
        step,
        num_active=num_active,
        total_steps=total,
        initial_drop_fraction=fraction,
        drop_schedule="cosine",
        **PAPER,
    )
    # 1 + cos(x) = 2 cos(x / 2)^2; the two roundings may differ just at an integer.
    exact = fraction * math.cos(math.pi * step / total / 2) ** 2 * num_active
    assert counted in {math.floor(exact - 1e-6), math.floor(exact + 1e-6)} and 0 <= counted <= num_active


def test_unknown_drop_schedule_is_refused() -> None:
    with pytest.raises(AssertionError, match="drop_schedule: 'exponential'"):
        num_to_replace(
            25,
            num_active=10,
            total_steps=30,
            initial_drop_fraction=0.2,
            drop_schedule="exponential",
            **PAPER,
        )


@pytest.mark.parametrize(("interval", "estimation"), [(5, 5), (5, 0), (4, 5)])
def test_impossible_intervals_are_refused(interval: int, estimation: int) -> None:
    with pytest.raises(AssertionError, match="expected interval > estimation"):
        is_event(5, interval_steps=interval, estimation_steps=estimation)


@pytest.mark.parametrize(("fraction", "expected"), [(1.0, 100), (0.29, 29), (0.0, 0)])
def test_the_first_event_replaces_all_or_a_share(fraction: float, expected: int) -> None:
    replaced = num_to_replace(
        5,
        num_active=100,
        total_steps=50,
        interval_steps=20,
        estimation_steps=5,
        initial_drop_fraction=0.2,
        first_drop_fraction=fraction,
    )
    assert replaced == expected
