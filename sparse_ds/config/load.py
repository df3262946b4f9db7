"""From the name of a configuration to a checked `RunConfig`.

The result depends on the file and the overrides only: no environment variable is read. Relative paths inside a
configuration (data, model, output folder) stay as they are and mean the working directory of the run.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from sparse_ds.config.conflicts import find_conflicts, idle_keys
from sparse_ds.config.errors import UserError
from sparse_ds.config.messages import describe_value, translate_errors
from sparse_ds.config.schema import RunConfig

CONFIGS_DIR = Path(__file__).resolve().parents[2] / "configs"
"""The configurations that come with the project."""
_ALTERNATIVES = (
    ("train.global_batch_size", "train.gradient_accumulation_steps"),
    ("train.max_steps", "train.num_epochs"),
)
"""Pairs of which one is given: an override of one displaces the other where it comes from the file."""


def find_config(name: str | Path) -> Path:
    """The file that `--config NAME` means: a path, else a name in the project's `configs/`, with or without `.json`.

    Raises:
        UserError: there is no such file; the message lists near matches and what there is.
    """
    if not str(name):
        raise UserError("--config: got an empty name, expected a path or a name in configs/.")
    for candidate in (Path(name), CONFIGS_DIR / name, CONFIGS_DIR / f"{name}.json"):
        if candidate.is_file():
            return candidate
    known = sorted(str(path.relative_to(CONFIGS_DIR)) for path in CONFIGS_DIR.rglob("*.json"))
    stems = {spelling: path for path in known for spelling in (path, path.removesuffix(".json"))}
    close = difflib.get_close_matches(str(name), list(stems), n=3, cutoff=0.5)
    near = list(dict.fromkeys(stems[spelling] for spelling in close))
    advice = f" Did you mean {' or '.join(near)}?" if near else ""
    shown = ", ".join(known) if known else "nothing"
    kind = "a folder" if Path(name).is_dir() else "no file"
    raise UserError(
        f"--config: {name} is {kind}, expected a path or a name in {CONFIGS_DIR}.{advice} There is: {shown}."
    )


def load_config(name_or_path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a configuration file and checks it.

    Args:
        name_or_path: as for `find_config`.
        overrides: texts `section.key=value`, the later wins; the value is JSON if it parses, else text.

    Raises:
        UserError: no such file, no JSON, or wrong values; one message with all problems.
    """
    path = find_config(name_or_path)
    return parse_config(read_json(path), overrides, source=str(path))


def parse_config(data: Mapping[str, Any], overrides: Sequence[str] = (), source: str = "configuration") -> RunConfig:
    """Checks a configuration that was already read.

    Args:
        data: sections by name. A top-level `versions` (which a run adds to its resolved configuration) is ignored.
        overrides: as for `load_config`.
        source: where the data comes from, for messages.

    Raises:
        UserError: wrong values; one message with all problems.
    """
    merged = {section: dict(keys) if isinstance(keys, Mapping) else keys for section, keys in data.items()}
    merged.pop("versions", None)
    overridden = _apply_overrides(merged, overrides)
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        problems = translate_errors(error, RunConfig, merged)
        if any(item["loc"] for item in error.errors()):
            # pydantic checks the conflicts only of a configuration without other mistakes; the user wants all at once.
            problems += find_conflicts(_read_valid_sections(merged, problems))
    problems = [line for problem in problems for line in problem.split("\n")]
    problems = [f"{line} (from --set)" if line.split(":")[0] in overridden else line for line in problems]
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise UserError("\n".join([f"{source}: {count}:", *(f"  {line}" for line in problems)])) from None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file whose top level is an object.

    Raises:
        UserError: unreadable, not UTF-8, no JSON (with line and column), a key twice, NaN, or no object.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8. Save the file in the encoding UTF-8.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from None
    try:
        data = json.loads(text, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}, column {error.colno}: no valid JSON: {error.msg}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: no valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: got {describe_value(data)}, expected an object with sections: {{...}}.")
    return data


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"the key {', '.join(twice)} is given twice in one object. Keep one of them.")
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number. Write a finite number.")


def _apply_overrides(data: dict[str, Any], overrides: Iterable[str]) -> set[str]:
    """Writes the overrides into `data`; returns the fields that they set."""
    given: dict[str, Any] = {}
    problems = []
    for override in overrides:
        field, equals, text = override.partition("=")
        field = field.strip()
        parts = field.split(".")
        if not equals or len(parts) < 2 or not all(parts):
            problems.append(f"--set: got {override!r}, expected section.key=value, for example train.max_steps=100.")
            continue
        given[field] = _parse_value(parts, text.strip())
    _displace_alternatives(data, given)
    for field, value in given.items():
        problems += _set_deep(data, field, value)
    if problems:
        raise UserError("\n".join(problems))
    return set(given)


def _parse_value(parts: Sequence[str], text: str) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return text
    # Where of all scalars only text is possible, 2024 is the folder or revision of that name.
    is_other_scalar = value is not None and not isinstance(value, str | list | dict)
    return text if is_other_scalar and _takes_text_of_scalars(parts) else value


def _takes_text_of_scalars(parts: Sequence[str]) -> bool:
    section = RunConfig.model_fields.get(parts[0])
    if section is None or len(parts) != 2 or not _is_model(section.annotation):
        return False
    assert section.annotation is not None
    field = section.annotation.model_fields.get(parts[1])
    if field is None:
        return False
    options = get_args(field.annotation) or (field.annotation,)
    plain = {get_args(option)[0] if get_args(option) else option for option in options}
    return str in plain and all(option in (str, type(None)) or get_origin(option) is list for option in plain)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _displace_alternatives(data: dict[str, Any], given: Mapping[str, Any]) -> None:
    displaced = []
    for pair in _ALTERNATIVES:
        for field, other in (pair, pair[::-1]):
            if given.get(field) is not None and other not in given:
                displaced.append(other)
    for section, keys in idle_keys(str(given.get("method.name"))).items():
        displaced += [f"{section}.{key}" for key in keys if f"{section}.{key}" not in given]
    for field in displaced:
        section, key = field.split(".")
        if isinstance(data.get(section), dict):
            data[section].pop(key, None)


def _set_deep(data: dict[str, Any], field: str, value: Any) -> list[str]:
    *parents, key = field.split(".")
    node = data
    for depth, name in enumerate(parents, start=1):
        child = node.get(name)
        if child is None:
            child = {}
        elif not isinstance(child, dict):
            held = ".".join(parents[:depth])
            return [f"--set: got {field}, but {held} is {describe_value(child)}, no section."]
        node[name] = child = dict(child)
        node = child
    node[key] = value
    return []


def _read_valid_sections(data: Mapping[str, Any], problems: Iterable[str]) -> dict[str, Any]:
    """The sections that are right by themselves, defaults included."""
    wrong = {problem.split(":")[0].split(".")[0] for problem in problems}
    sections: dict[str, Any] = {}
    for name, field in RunConfig.model_fields.items():
        if name in wrong:
            continue
        value = data.get(name, {})
        model = field.annotation
        if isinstance(model, type) and issubclass(model, BaseModel):
            sections[name] = model.model_validate(value)
        else:
            sections[name] = value
    return sections
