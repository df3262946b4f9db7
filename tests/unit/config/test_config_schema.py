"""The sections themselves: documentation, batch arithmetic, warnings, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sparse_ds.config import RunConfig, UserError, parse_config
from sparse_ds.config.schema import Tracker


def make(**train: Any) -> RunConfig:
    return parse_config({"optimizer": {"learning_rate": 0.001}, "train": {"output_dir": "x", **train}})


def test_every_field_is_documented() -> None:
    for section, field in RunConfig.model_fields.items():
        assert field.description, section
        for key, inner in getattr(field.annotation, "model_fields", {}).items():
            assert inner.description, f"{section}.{key}"


def test_the_names_that_scripts_outside_use() -> None:
    given_names = (
        "model.name_or_path model.quantization model.dtype data.train data.eval data.format data.sequence_length "
        "method.name method.density method.target_modules method.interval_steps method.estimation_steps "
        "method.initial_drop_fraction optimizer.learning_rate optimizer.weight_decay train.output_dir train.max_steps "
        "train.micro_batch_size train.gradient_accumulation_steps train.seed train.overwrite "
        "train.gradient_checkpointing checkpoint.interval_steps export.merged"
    )
    config = make()
    for name in given_names.split():
        section, key = name.split(".")
        assert hasattr(getattr(config, section), key), name


def test_trackers_are_those_of_transformers() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(Tracker.__args__) == set(INTEGRATION_TO_CALLBACK)


def test_a_configuration_cannot_be_changed() -> None:
    config = make()
    with pytest.raises(ValidationError):
        config.train.seed = 1  # type: ignore[misc]


def test_importing_loads_no_torch() -> None:
    code = (
        "import sys; import sparse_ds.config; "
        "heavy = {'torch', 'deepspeed', 'transformers', 'numpy', 'accelerate'} & set(sys.modules); print(sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("train", "world_size", "expected"),
    [
        ({}, 1, (1, 1, 1)),
        ({"micro_batch_size": 4}, 2, (4, 1, 8)),
        ({"micro_batch_size": 4, "gradient_accumulation_steps": 3}, 2, (4, 3, 24)),
        ({"micro_batch_size": 8, "global_batch_size": 32}, 1, (8, 4, 32)),
        ({"micro_batch_size": 8, "global_batch_size": 32}, 2, (8, 2, 32)),
        ({"micro_batch_size": 8, "global_batch_size": 32}, 4, (8, 1, 32)),
        ({"micro_batch_size": 2, "gradient_accumulation_steps": 4, "global_batch_size": 16}, 2, (2, 4, 16)),
    ],
)
def test_batch_plan(train: dict[str, int], world_size: int, expected: tuple[int, int, int]) -> None:
    plan = make(**train).batch_plan(world_size)
    assert plan == expected
    assert (plan.micro_batch_size, plan.gradient_accumulation_steps, plan.global_batch_size) == expected


@pytest.mark.parametrize(
    ("train", "world_size", "expected"),
    [
        (
            {"micro_batch_size": 8, "global_batch_size": 32},
            3,
            r"train\.global_batch_size: got 32, expected a multiple of train\.micro_batch_size \(8\) x ranks \(3\) "
            r"= 24, for example 24 or 48; or start 1, 2, 4 ranks",
        ),
        (
            {"micro_batch_size": 8, "global_batch_size": 32},
            8,
            r"= 64, for example 64; or train\.micro_batch_size 1, 2, 4 with the global batch as it is",
        ),
        (
            {"micro_batch_size": 2, "gradient_accumulation_steps": 4, "global_batch_size": 16},
            1,
            r"got 16, but train\.micro_batch_size \(2\) x train\.gradient_accumulation_steps \(4\) x ranks \(1\) = 8",
        ),
    ],
)
def test_a_batch_that_does_not_fit(train: dict[str, int], world_size: int, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        make(**train).batch_plan(world_size)


@given(micro=st.integers(1, 64), multiple=st.integers(1, 64), world_size=st.integers(1, 64))
def test_batch_plan_adds_up(micro: int, multiple: int, world_size: int) -> None:
    config = make(micro_batch_size=micro, global_batch_size=micro * multiple)
    try:
        plan = config.batch_plan(world_size)
    except UserError:
        assert multiple % world_size != 0
    else:
        assert plan.global_batch_size == micro * multiple
        assert plan.micro_batch_size * plan.gradient_accumulation_steps * world_size == micro * multiple


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, []),
        ({"model": {"quantization": "none", "double_quantization": True}}, ["model.double_quantization has no effect"]),
        (
            {"train": {"output_dir": "x", "max_steps": 3}},
            ["No drop-and-grow event will happen: the first is at step 5"],
        ),
        ({"train": {"output_dir": "x", "max_steps": 5}}, []),
        (
            {"model": {"quantization": "none"}, "export": {"base_weights": "original"}},
            ["export.base_weights original has no effect: model.quantization is none"],
        ),
        ({"export": {"merged": False, "verify": True}}, ["export.verify has no effect: export.merged is false"]),
        (
            {
                "data": {"eval": None, "num_eval_samples": 4},
                "train": {"output_dir": "x", "eval_interval_steps": 5, "early_stopping_patience": 2},
            },
            [
                "train.eval_interval_steps has no effect",
                "train.early_stopping_patience has no effect",
                "data.num_eval_samples has no effect",
            ],
        ),
    ],
)
def test_warnings(sections: dict[str, Any], expected: list[str]) -> None:
    config = parse_config({"optimizer": {"learning_rate": 0.001}, "train": {"output_dir": "x"}, **sections})
    found = config.warnings()
    assert len(found) == len(expected)
    assert all(sentence.startswith(start) for sentence, start in zip(found, expected, strict=True))
