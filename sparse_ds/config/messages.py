"""What pydantic found wrong, in one line per field: what was given, what is expected, and what the field is for."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

_TYPE_NAMES = {
    bool: "true or false",
    int: "integer",
    float: "number",
    str: "text",
    list: "list",
    dict: "section",
    tuple: "list",
    type(None): "null",
}
_MAX_SHOWN_CHARS = 60


def describe_value(value: Any) -> str:
    """A value as it stands in JSON, cut to 60 characters, with its type."""
    try:
        shown = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        shown = repr(value)
    if len(shown) > _MAX_SHOWN_CHARS:
        shown = shown[: _MAX_SHOWN_CHARS - 3] + "..."
    kind = _TYPE_NAMES.get(type(value), type(value).__name__)
    return "null" if value is None else f"{shown} ({kind})"


def translate_errors(error: ValidationError, model: type[BaseModel], data: Mapping[str, Any]) -> list[str]:
    """One line per wrong field of `model`, in the order of the fields; conflicts come as they were written.

    Args:
        error: what pydantic raised for `model`.
        model: the configuration class: a class of sections, each a class of fields.
        data: what was validated.
    """
    lines: dict[tuple[str, ...], str] = {}
    schema = model.model_json_schema()
    for item in error.errors(include_url=False, include_input=False):
        location = tuple(str(part) for part in item["loc"][:2])
        if location in lines:
            continue
        if not location:
            lines[location] = str(item["ctx"]["error"]) if "ctx" in item else item["msg"]
        elif len(item["loc"]) > 3 and isinstance(item["loc"][2], int):
            lines[location] = _explain_entry(item, data)
        elif item["type"] == "extra_forbidden":
            lines[location] = _explain_unknown(location, schema)
        else:
            lines[location] = _explain_wrong(location, schema, data)
    return list(lines.values())


def _explain_unknown(location: Sequence[str], schema: Mapping[str, Any]) -> str:
    name, field = location[-1], ".".join(location)
    if len(location) == 1:
        known = list(schema["properties"])
        close = difflib.get_close_matches(name, known, n=1)
        owners = [section for section in known if name in _fields_of(section, schema)]
        guess = close[0] if close else f"{owners[0]}.{name}" if owners else None
        advice = f"; did you mean {guess}?" if guess else "."
        return f"{field}: unknown section{advice} The sections are {', '.join(known)}."
    section = location[0]
    known = list(_fields_of(section, schema))
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    owners = [other for other in schema["properties"] if name in _fields_of(other, schema)]
    if owners:
        return f"{field}: unknown key; did you mean {owners[0]}.{name}?"
    if close:
        return f"{field}: unknown key; did you mean {section}.{close[0]}?"
    return f"{field}: unknown key. The keys of {section} are {', '.join(known)}."


def _explain_wrong(location: Sequence[str], schema: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    field = ".".join(location)
    spec = schema["properties"][location[0]]
    value: Any = data.get(location[0], _MISSING)
    if len(location) == 2:
        spec = _fields_of(location[0], schema)[location[1]]
        value = value.get(location[1], _MISSING) if isinstance(value, Mapping) else _MISSING
    expected = _describe_schema(_resolve(spec, schema), schema)
    given = "missing" if value is _MISSING else f"got {describe_value(value)}"
    purpose = " ".join(spec.get("description", "").split())
    return f"{field}: {given}, expected {expected}." + (f" {purpose}" if purpose else "")


def _explain_entry(item: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """A mistake inside one entry of a list of sections: `data.tasks[0].kind`."""
    field = ""
    value: Any = _MISSING if item["type"] == "missing" else data
    for part in item["loc"]:
        field += f"[{part}]" if isinstance(part, int) else f".{part}" if field else str(part)
        value = value if value is _MISSING else value[part]
    if item["type"] == "extra_forbidden":
        return f"{field}: unknown key."
    given = "missing" if value is _MISSING else f"got {describe_value(value)}"
    return f"{field}: {given}. {str(item['msg']).removeprefix('Value error, ')}."


def _fields_of(section: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = _resolve(schema["properties"][section], schema).get("properties", {})
    return found


def _resolve(spec: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    if "$ref" not in spec:
        return spec
    resolved: Mapping[str, Any] = schema["$defs"][spec["$ref"].rsplit("/", 1)[-1]]
    return resolved


def _describe_schema(spec: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    if "anyOf" in spec:
        return " or ".join(_describe_schema(_resolve(option, schema), schema) for option in spec["anyOf"])
    if "enum" in spec:
        return "one of " + ", ".join(str(choice) for choice in spec["enum"])
    if "const" in spec:
        return f'"{spec["const"]}"'
    kind = spec.get("type")
    if kind == "string":
        if "pattern" in spec:
            return f"text like {spec['default']} ({spec['pattern']})"
        return "text that is not empty" if spec.get("minLength") else "text"
    if kind == "array":
        if "prefixItems" in spec:
            return f"a list of {len(spec['prefixItems'])} numbers, each {_range(spec['prefixItems'][0])}".strip()
        return f"a list of {_plural(_resolve(spec['items'], schema))}"
    if kind == "object":
        return "a section ({...})"
    names = {"integer": "an integer", "number": "a number", "boolean": "true or false", "null": "null"}
    return f"{names[str(kind)]} {_range(spec)}".strip()


def _plural(item: Mapping[str, Any]) -> str:
    if item.get("type") == "object":
        # A task may be given as a text.
        if item["title"] == "TaskConfig":
            return "texts or sections ({...})"
        return "{" + ", ".join(item["properties"]) + "}"
    return "names out of " + ", ".join(item["enum"]) if "enum" in item else "texts"


def _range(spec: Mapping[str, Any]) -> str:
    bounds = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
    return " and ".join(f"{sign} {spec[name]:.15g}" for name, sign in bounds if name in spec)


_MISSING = object()
