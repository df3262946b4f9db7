"""Templates by name or from a file: BOS and the end of an answer as the tokenizer has them, and what is exported."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from sparse_ds.config.errors import UserError
from sparse_ds.data import build_dataset
from sparse_ds.data.named_templates import (
    NAMED_TEMPLATES,
    exported_template,
    named_template,
    use_template,
    without_marks,
)

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
SYSTEM = {"role": "system", "content": "S"}


def render(tokenizer: PreTrainedTokenizerFast, *messages: dict[str, str], asks: bool = False) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=asks))


EXPECTED = {
    "alpaca": "<s>S\n\n### Instruction:\nQ\n\n### Response:\nA</s>\n\n### Instruction:\nQ\n\n### Response:\nA</s>",
    "chatml": "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA</s>\n"
    "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA</s>\n",
    "llama-2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST] A </s><s>[INST] Q [/INST] A </s>",
    "mistral": "<s> [INST] S\n\nQ [/INST] A</s> [INST] Q [/INST] A</s>",
}


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_bos_only_where_the_tokenizer_writes_it(make_tokenizer: MakeTokenizer, name: str) -> None:
    talk = (SYSTEM, USER, ASSISTANT, USER, ASSISTANT)
    for template, with_bos in (("<s> $A", True), ("$A </s>", False)):
        tokenizer = make_tokenizer(template=template)
        use_template(tokenizer, name)
        expected = EXPECTED[name] if with_bos else EXPECTED[name].replace("<s>", "")
        assert render(tokenizer, *talk) == expected
        # What is asked is the beginning of what was learned.
        asked = render(tokenizer, *talk[:4], asks=True)
        assert expected.startswith(asked) and expected[len(asked) :].strip().startswith("A")


def test_alpaca_without_a_system_message_is_the_prompt_of_alpaca_rows(
    make_tokenizer: MakeTokenizer, write_jsonl: Callable[..., Path]
) -> None:
    row = {"instruction": "Q", "input": "", "output": "A"}
    (sample,) = build_dataset(write_jsonl(row), make_tokenizer()).dataset
    tokenizer = make_tokenizer()
    use_template(tokenizer, "alpaca")
    asked = tokenizer.apply_chat_template([USER], tokenize=True, return_dict=True, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([USER, ASSISTANT], tokenize=True, return_dict=True)
    assert whole["input_ids"] == sample["input_ids"]
    assert asked["input_ids"] == sample["input_ids"][: len(asked["input_ids"])]


@pytest.mark.parametrize(
    ("tokens", "eos", "end"),
    [
        ([], "</s>", "A</s>\n"),
        (["<|im_start|>", "<|im_end|>"], "</s>", "A<|im_end|></s>\n"),
        (["<|im_start|>", "<|im_end|>"], "<|im_end|>", "A<|im_end|>\n"),
    ],
)
def test_chatml_ends_an_answer_with_eos(make_tokenizer: MakeTokenizer, tokens: list[str], eos: str, end: str) -> None:
    tokenizer = make_tokenizer(template="$A")
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.eos_token = eos
    use_template(tokenizer, "chatml")
    assert render(tokenizer, USER, ASSISTANT) == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n" + end
    rendered = tokenizer.apply_chat_template(
        [USER, ASSISTANT], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    learned = [token for token, flag in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True) if flag]
    assert tokenizer.decode(learned) == end.strip()
    assert learned[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_the_exported_template_has_no_marks_and_renders_the_same(make_tokenizer: MakeTokenizer, name: str) -> None:
    tokenizer = make_tokenizer()
    use_template(tokenizer, name)
    exported = exported_template(tokenizer, name)
    assert exported is not None and "generation %}" not in exported
    assert exported == without_marks(named_template(name, tokenizer)) != named_template(name, tokenizer)
    for talk, asks in (((SYSTEM, USER, ASSISTANT), False), ((USER, ASSISTANT, USER), True)):
        before = render(tokenizer, *talk, asks=asks)
        plain = make_tokenizer(chat_template=exported)
        assert render(plain, *talk, asks=asks) == before


def test_auto_and_tokenizer_export_nothing(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(chat_template="{{ messages[0].content }}")
    for name in ("auto", "tokenizer"):
        use_template(tokenizer, name)
        assert exported_template(tokenizer, name) is None
        assert tokenizer.chat_template == "{{ messages[0].content }}"


@pytest.mark.parametrize("name", ["alpaca", "llama-2", "mistral"])
@pytest.mark.parametrize(
    "talk", [(USER, USER, ASSISTANT), (USER, SYSTEM, USER, ASSISTANT), (USER, ASSISTANT, ASSISTANT)]
)
def test_user_and_assistant_alternate(
    make_tokenizer: MakeTokenizer, write_jsonl: Callable[..., Path], name: str, talk: tuple[dict[str, str], ...]
) -> None:
    with pytest.raises(UserError, match=r"line 1: the chat template refuses the conversation: .* must alternate"):
        build_dataset(write_jsonl({"messages": talk}), make_tokenizer(), template=name)


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_no_tools(make_tokenizer: MakeTokenizer, write_jsonl: Callable[..., Path], name: str) -> None:
    path = write_jsonl({"messages": [USER, ASSISTANT, {"role": "tool", "content": "5"}, ASSISTANT]})
    with pytest.raises(UserError, match=r"refuses the conversation: this template knows no tools"):
        build_dataset(path, make_tokenizer(), template=name)


def test_a_file(make_tokenizer: MakeTokenizer, write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}", encoding="utf-8")
    tokenizer = make_tokenizer()
    row = {"instruction": "I", "input": "J", "output": "O"}
    (sample,) = build_dataset(write_jsonl(row), tokenizer, template=str(path)).dataset
    # Nothing after the last answer says that it ends, so EOS does.
    assert tokenizer.decode(sample["input_ids"]) == "user=I\n\nJ;assistant=O;</s>"
    assert exported_template(tokenizer, str(path)) == path.read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{% for m in messages %}", r"line 1: no valid Jinja: "),
        (b"a\n{% if %}", r"line 2: no valid Jinja: "),
        (b"caf\xe9", r"byte 3 is not UTF-8"),
    ],
)
def test_bad_files(make_tokenizer: MakeTokenizer, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "mine.jinja").write_bytes(content)
    with pytest.raises(UserError, match=rf"data\.template: .*mine\.jinja.*{message}"):
        use_template(make_tokenizer(), str(tmp_path / "mine.jinja"))


def test_no_such_template(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(UserError, match=r"data\.template: got llama2, expected auto, .*; there is no such file in"):
        use_template(make_tokenizer(), "llama2")
    with pytest.raises(UserError, match=r"data\.template: got tokenizer, and the model's tokenizer has no chat"):
        use_template(make_tokenizer(), "tokenizer")


def test_text_has_no_use_for_a_template(
    make_tokenizer: MakeTokenizer, write_jsonl: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = write_jsonl({"text": "Hi"})
    with caplog.at_level(logging.WARNING, "sparse_ds.data"):
        data = build_dataset(path, make_tokenizer(), template="chatml", show_progress=True)
    assert data.dataset[0]["input_ids"] == [1, 77, 110, 2]
    assert "data.template has no effect on" in caplog.text
