"""The methods that there are, what each uses of a run, and that nothing else may be given."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import sparse_ds.selection.methods
from sparse_ds.config import MethodConfig, OptimizerConfig, RunConfig, UserError, parse_config
from sparse_ds.config.conflicts import METHOD_KEYS, OPTIMIZER_KEYS, TRAIN_KEYS, idle_keys
from sparse_ds.config.methods import MethodFacts, all_methods

VALUES: dict[str, Any] = {
    "method.density": 0.1,
    "method.target_modules": ["q_proj"],
    "method.block_size": [1, 16],
    "method.index_storage": "compact",
    "method.interval_steps": 30,
    "method.estimation_steps": 4,
    "method.initial_drop_fraction": 0.3,
    "method.first_drop_fraction": 0.5,
    "method.drop_schedule": "cosine",
    "method.drop_criterion": "change",
    "method.redistribution_factor": 1.5,
    "method.candidate_source": "step",
    "method.gradient_tile_mib": 8,
    "method.gradient_accumulator_limit_gib": 0.5,
    "method.random_growth_fraction": 0.1,
    "method.sampling": "bernoulli",
    "method.train_biases": True,
    "method.train_norms": True,
    "optimizer.momentum": 0.5,
    "optimizer.betas": [0.8, 0.99],
    "optimizer.moments": "int8",
    "optimizer.age_warmup_steps": 25,
}
"""A valid value, not the default, of every key that some method does not use."""
# What each method uses besides method.density, target_modules, block_size: a literal reading of what the methods are.
REPEATED = {"interval_steps", "estimation_steps", "initial_drop_fraction", "drop_schedule", "drop_criterion"}
REPEATED |= {"redistribution_factor", "first_drop_fraction"}
DENSE_GRADIENT = {"gradient_tile_mib", "gradient_accumulator_limit_gib"}
ADAMW = {"betas", "moments", "age_warmup_steps", "index_storage"}
USED = {
    "sft_ag": REPEATED | DENSE_GRADIENT | ADAMW | {"candidate_source"},
    "sft_ma": REPEATED | {"random_growth_fraction", "momentum"},
    "sparta": ADAMW | {"sampling", "train_biases", "train_norms"},
    "fisher": DENSE_GRADIENT | ADAMW | {"estimation_steps"},
    "accumulated_gradient": DENSE_GRADIENT | ADAMW | {"estimation_steps"},
}


def make(method: str, **given: Any) -> RunConfig:
    """`given`: section__key=value."""
    data: dict[str, Any] = {
        "model": {"quantization": "none" if method == "full" else "nf4"},
        "optimizer": {"learning_rate": 0.001},
        "train": {"output_dir": "runs/x"},
        "method": {"name": method},
    }
    for field, value in given.items():
        section, key = field.split("__")
        data[section][key] = value
    return parse_config(data)


def uses(method: str, key: str) -> bool:
    if method == "full":
        return key == "betas"
    return key in {"density", "target_modules", "block_size"} | USED[method]


def test_the_methods_are_the_files_of_the_folder_and_full() -> None:
    folder = Path(sparse_ds.selection.methods.__path__[0])
    files = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    assert list(all_methods()) == [*files, "full"]
    assert set(USED) == set(files)


@pytest.mark.parametrize("method", all_methods())
def test_facts_are_valid(method: str) -> None:
    facts = all_methods()[method]
    hints = get_type_hints(MethodFacts)
    for field in fields(MethodFacts):
        choices = get_args(hints[field.name])
        value = getattr(facts, field.name)
        if choices and ... not in choices:
            assert value in choices, field.name
        else:
            assert isinstance(value, {"summary": str, "keys": tuple, "trains_all": bool}[field.name]), field.name
    assert facts.summary and "\n" not in facts.summary
    # Measuring is for events, and squares are summed over a whole phase only.
    assert facts.statistic == "none" or facts.events != "none"
    assert facts.statistic != "gradient_square" or facts.events == "once"
    assert facts.trains_all == (method == "full")


@pytest.mark.parametrize("method", all_methods())
def test_what_facts_name_is_a_key_of_the_configuration(method: str) -> None:
    assert all_methods()[method].used_keys <= set(MethodConfig.model_fields)


def test_every_key_of_the_section_is_some_methods() -> None:
    assert {*METHOD_KEYS, "name"} == set(MethodConfig.model_fields)
    assert set(OPTIMIZER_KEYS) <= set(OptimizerConfig.model_fields)
    assert {f"method.{key}" for key in METHOD_KEYS} | {f"optimizer.{key}" for key in OPTIMIZER_KEYS} == set(VALUES)


@pytest.mark.parametrize("method", all_methods())
@pytest.mark.parametrize("field", VALUES)
def test_a_key_of_another_method_is_refused_and_the_message_says_whose_it_is(field: str, method: str) -> None:
    section, key = field.split(".")
    assert (key not in idle_keys(method)[section]) == uses(method, key)
    given = {f"{section}__{key}": VALUES[field]}
    if uses(method, key):
        value = getattr(getattr(make(method, **given), section), key)
        assert value == (tuple(VALUES[field]) if key in ("betas", "block_size") else VALUES[field])
        return
    users = ", ".join(name for name in all_methods() if uses(name, key))
    message = f"{field}: given, but method.name {method} does not use it. Remove it, or choose a method that does"
    with pytest.raises(UserError, match=re.escape(f"{message} ({users}).")):
        make(method, **given)


@pytest.mark.parametrize("method", all_methods())
def test_a_key_of_another_method_is_refused_at_its_default_too(method: str) -> None:
    for key in idle_keys(method)["method"]:
        with pytest.raises(UserError, match=rf"method\.{key}: given, but method\.name {method} does not use it"):
            make(method, **{f"method__{key}": MethodConfig.model_fields[key].default})


@pytest.mark.parametrize("method", all_methods())
def test_a_resolved_configuration_holds_what_the_method_uses_and_loads_again(method: str) -> None:
    # Blocks and compact indices exclude each other.
    values = VALUES | {"method.index_storage": "int32"}
    used = {field.replace(".", "__"): value for field, value in values.items() if uses(method, field.split(".")[1])}
    config = make(method, **used)
    written = config.to_dict()
    assert {key for key in METHOD_KEYS if key in written["method"]} == {k for k in METHOD_KEYS if uses(method, k)}
    assert {key for key in OPTIMIZER_KEYS if key in written["optimizer"]} == {
        key for key in OPTIMIZER_KEYS if uses(method, key)
    }
    assert parse_config(written).to_dict() == written


def test_a_name_that_is_no_method_has_no_idle_keys() -> None:
    """Its own mistake is reported; what it would use is not known."""
    assert idle_keys("sft_mb") == {}


@pytest.mark.parametrize("method", ["fisher", "accumulated_gradient"])
def test_one_event_needs_no_room_between_events(method: str) -> None:
    config = make(method, method__estimation_steps=500)
    assert config.warnings() == []


@pytest.mark.parametrize("method", all_methods())
def test_a_run_that_ends_before_the_first_event_is_warned_of(method: str) -> None:
    warnings = make(method, train__max_steps=4).warnings()
    has_events = all_methods()[method].events != "none"
    assert [text.split(":")[0] for text in warnings] == ["No drop-and-grow event will happen"] * has_events


def test_a_run_of_every_weight_has_no_gradient_of_sparse_values() -> None:
    for key, value in zip(TRAIN_KEYS, ("dense", 0.01), strict=True):
        with pytest.raises(UserError, match=rf"train\.{key}: given, but method\.name full does not use it"):
            make("full", **{f"train__{key}": value})
    assert not set(TRAIN_KEYS) & set(make("full", train__max_steps=3).to_dict()["train"])


def test_a_crossover_where_nothing_is_chosen_is_refused() -> None:
    with pytest.raises(UserError, match="nothing is chosen by the density"):
        make("sft_ma", train__values_gradient="sampled", train__values_gradient_crossover=0.1)


@pytest.mark.parametrize("block_size", [16, [1, 4]])
def test_compact_indices_are_of_single_weights(block_size: Any) -> None:
    with pytest.raises(UserError, match=r"method\.index_storage: got compact, expected int32 with method\.block_size"):
        make("sft_ag", method__block_size=block_size, method__index_storage="compact")
    assert make("sft_ag", method__block_size=1, method__index_storage="compact").method.index_storage == "compact"
    assert make("sft_ag", method__block_size=block_size, method__index_storage="int32").method.index_storage == "int32"
