"""Rows that hold conversations: OpenAI's `messages` and ShareGPT's `conversations`.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}], "system": "..."}

Both become the same `Conversation`. It is cut after the last assistant turn: what follows would be read and never
learned from. Turns may call tools (`tool_calls`, the role `tool`, a row's `tools`), if the chat template shows them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from sparse_ds.config.errors import UserError
from sparse_ds.data.reading import Row
from sparse_ds.data.row_fields import checked_text, field_value, learned_text, text_field, wrong_type
from sparse_ds.data.samples import Conversation, Message

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}
_PASSED_ON = ("name", "tool_calls", "tool_call_id")


def messages_sample(row: Row) -> Conversation:
    """`messages`: a list of `{"role", "content"}`."""
    turns = _turns(row, "messages", '{"role": "...", "content": "..."}')
    messages = [_message(row, f"messages[{number}]", turn) for number, turn in enumerate(turns)]
    return _conversation(row, "messages", messages)


def sharegpt_sample(row: Row) -> Conversation:
    """`conversations`: a list of `{"from", "value"}` (or `{"role", "content"}`), and `system`, which may be absent."""
    turns = _turns(row, "conversations", '{"from": "human", "value": "..."}')
    messages = [_sharegpt_message(row, f"conversations[{number}]", turn) for number, turn in enumerate(turns)]
    if row.fields.get("system"):
        messages.insert(0, {"role": "system", "content": text_field(row, "system")})
    return _conversation(row, "conversations", messages)


def _turns(row: Row, name: str, example: str) -> list[Mapping[str, object]]:
    turns = field_value(row, name)
    if not isinstance(turns, list):
        raise wrong_type(row, name, turns, f"a list of {example}")
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise wrong_type(row, f"{name}[{number}]", turn, example)
    return turns


def _conversation(row: Row, name: str, messages: list[Message]) -> Conversation:
    last = max((number for number, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is None:
        raise UserError(
            f'{row.location}: field "{name}" has no turn of the role assistant, so there is nothing to learn. '
            "Add the answer or remove the sample."
        )
    spoken = [message["role"] for message in messages if message["role"] not in ("system", "developer")]
    if spoken[0] == "assistant":
        raise UserError(
            f'{row.location}: field "{name}" starts with a turn of the role assistant, expected what it answers. '
            "Add the user's turn, or write the sample as prompt and completion."
        )
    return Conversation(tuple(messages[: last + 1]), row.location, _tools(row))


def _message(row: Row, name: str, turn: Mapping[str, object]) -> Message:
    inner = Row(turn, row.location)
    role = text_field(inner, "role", f"{name}.role")
    if role not in ROLES:
        raise UserError(f'{row.location}: field "{name}.role" is {role!r}, expected one of {", ".join(ROLES)}.')
    if turn.get("weight") not in (None, 1):
        raise UserError(
            f'{row.location}: field "{name}.weight" is {turn["weight"]!r}, expected 1 or none: all turns of the '
            "assistant are learned alike. Remove it, or end the conversation before that turn."
        )
    # Columnar files give every turn the fields of all turns, with nulls.
    passed_on = {key: turn[key] for key in _PASSED_ON if turn.get(key)}
    if role == "assistant" and "tool_calls" in passed_on and not turn.get("content"):
        return {"role": role, "content": "", **passed_on}
    content = _content(row, f"{name}.content", field_value(inner, "content", f"{name}.content"))
    if role == "assistant" and "tool_calls" not in passed_on:
        learned_text(row, content, f"{name}.content")
    return {"role": role, "content": content, **passed_on}


def _content(row: Row, name: str, value: object) -> str:
    """Text, or OpenAI's list of parts if all of them are text."""
    if not isinstance(value, list) or not value or not all(_is_text_part(part) for part in value):
        return checked_text(row, value, name)
    return "".join(checked_text(row, part["text"], name) for part in value)


def _is_text_part(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and "text" in part


def _sharegpt_message(row: Row, name: str, turn: Mapping[str, object]) -> Message:
    inner = Row(turn, row.location)
    who, what = ("role", "content") if "from" not in turn and "role" in turn else ("from", "value")
    speaker = text_field(inner, who, f"{name}.{who}")
    role = SHAREGPT_ROLES.get(speaker.lower())
    if role is None:
        raise UserError(
            f'{row.location}: field "{name}.{who}" is {speaker!r}, expected one of {", ".join(SHAREGPT_ROLES)}.'
        )
    content = text_field(inner, what, f"{name}.{what}")
    return {"role": role, "content": learned_text(row, content, f"{name}.{what}") if role == "assistant" else content}


def _tools(row: Row) -> tuple[Mapping[str, object], ...]:
    """The row's `tools`: a list of objects, or the same as JSON text; absent, null and empty are none."""
    value = row.fields.get("tools")
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise wrong_type(row, "tools", value, "a list of objects, or such a list as JSON") from None
    if not value:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise wrong_type(row, "tools", value, "a list of objects, or such a list as JSON")
    return tuple(value)
