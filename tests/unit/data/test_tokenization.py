"""Golden ids and masks. The byte tokenizer of conftest makes them computable by hand: 5 + byte, `ab` = 261."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sparse_ds.config.errors import UserError
from sparse_ds.data import build_dataset
from sparse_ds.data.samples import Conversation, PromptCompletion, Text
from sparse_ds.data.templates import alpaca_prompt
from sparse_ds.data.tokenization import EncodedSample, SampleEncoder

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
BOS, EOS, TURN, END, AB = 1, 2, 3, 4, 261
MASKED = -100


def ids_of(text: str) -> list[int]:
    return [5 + byte for byte in text.encode()]


def encode(tokenizer: PreTrainedTokenizerFast, sample: object, sequence_length: int = 10_000) -> EncodedSample:
    return SampleEncoder(tokenizer, sequence_length).encode([sample])[0]


def pair(prompt: str, completion: str) -> PromptCompletion:
    return PromptCompletion(prompt, completion, "here")


def golden(write_jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, row: dict) -> tuple[list, list, str]:
    data = build_dataset(write_jsonl(row), tokenizer)
    return data.dataset[0]["input_ids"], data.dataset[0]["labels"], data.format_name


def test_golden_alpaca(write_jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3é"}
    prompt = ids_of(alpaca_prompt("Add.", "1 2"))
    ids, labels, name = golden(write_jsonl, tokenizer, row)
    assert name == "alpaca"
    assert ids == [BOS, *prompt, 56, 200, 174, EOS]
    assert labels == [MASKED] * (1 + len(prompt)) + [56, 200, 174, EOS]


def test_golden_prompt_completion(write_jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerFast) -> None:
    ids, labels, name = golden(write_jsonl, tokenizer, {"prompt": "Q: ab", "completion": " ok"})
    assert name == "prompt_completion"
    assert ids == [BOS, 86, 63, 37, AB, 37, 116, 112, EOS]
    assert labels == [MASKED] * 5 + [37, 116, 112, EOS]


def test_golden_text(write_jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerFast) -> None:
    ids, labels, name = golden(write_jsonl, tokenizer, {"text": "Hi"})
    assert name == "text"
    assert ids == labels == [BOS, 77, 110, EOS]


def test_golden_messages(make_tokenizer: MakeTokenizer, write_jsonl: Callable[..., Path]) -> None:
    tokenizer = make_tokenizer(chat_template=PLAIN)
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "ok"}]}
    ids, labels, name = golden(write_jsonl, tokenizer, row)
    asked = [BOS, TURN, *ids_of("user\nHi"), END, *ids_of("\n"), TURN, *ids_of("assistant\n")]
    assert name == "messages"
    assert ids == [*asked, 116, 112, END, *ids_of("\n")]
    assert labels == [MASKED] * len(asked) + [116, 112, END, MASKED]


def test_boundary_is_never_inside_a_token(tokenizer: PreTrainedTokenizerFast) -> None:
    joined = tokenizer("ab")["input_ids"]
    encoded = encode(tokenizer, pair("a", "b"))
    assert joined == [BOS, AB]
    assert encoded.input_ids == [BOS, *ids_of("ab"), EOS]
    assert encoded.labels == [MASKED, MASKED, *ids_of("b"), EOS]


@pytest.mark.parametrize(
    ("template", "leading"),
    [("<s> $A", [BOS]), ("<s> $A </s>", [BOS]), ("$A </s>", []), ("$A", []), (None, [])],
)
def test_bos_and_eos_exactly_once_whatever_the_tokenizer_adds(
    make_tokenizer: MakeTokenizer, template: str | None, leading: list[int]
) -> None:
    tokenizer = make_tokenizer(template=template)
    encoded = encode(tokenizer, pair("x", "y"))
    assert encoded.input_ids == [*leading, *ids_of("xy"), EOS]
    assert encoded.labels == [MASKED] * (len(leading) + 1) + [*ids_of("y"), EOS]
    assert encode(tokenizer, Text("x", "here")).input_ids == [*leading, *ids_of("x"), EOS]
    assert [block.input_ids for block in SampleEncoder(tokenizer, 4).encode_stream("xyz")] == [
        [*leading, *ids_of("xyz")]
    ]


def test_special_tokens_in_the_text_are_not_repeated(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode(tokenizer, pair("<s>x", "y</s>"))
    assert encoded.input_ids == [BOS, *ids_of("xy"), EOS]
    assert encode(tokenizer, Text("<s>x</s>", "here")).input_ids == [BOS, *ids_of("x"), EOS]


def test_sentencepiece_style_completion_starts_with_its_word_mark() -> None:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁the": 3, "▁end": 4}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    encoded = encode(tokenizer, pair("the", "end"))
    assert encoded.input_ids == [1, 3, 4, 2]
    assert encoded.labels == [MASKED, MASKED, 4, 2]


@pytest.mark.parametrize(
    ("length", "kept", "num_trained", "is_truncated"),
    [(7, "Qxyz", 4, False), (6, "Qxyz", 4, False), (5, "Qxyz", 3, True), (3, "Qx", 1, True), (2, "Q", 0, True)],
)
def test_truncation_keeps_the_start_and_drops_eos(
    tokenizer: PreTrainedTokenizerFast, length: int, kept: str, num_trained: int, is_truncated: bool
) -> None:
    encoded = encode(tokenizer, pair("Q", "xyz"), length)
    assert encoded.input_ids == [BOS, *ids_of(kept)] + ([] if is_truncated else [EOS])
    assert encoded.labels[:2] == [MASKED, MASKED]
    assert encoded.labels[2:] == encoded.input_ids[2:]
    assert encoded.num_trained_tokens == num_trained
    assert encoded.is_truncated is is_truncated


def test_first_token_of_a_sample_cannot_be_predicted(
    make_tokenizer: MakeTokenizer, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert encode(tokenizer, Text("xy", "here")).num_trained_tokens == 3
    assert encode(make_tokenizer(template=None), Text("xy", "here")).num_trained_tokens == 2


def test_batches_keep_order_across_kinds(tokenizer: PreTrainedTokenizerFast) -> None:
    samples = [pair("a", "b"), Text("c", "here"), pair("d", "e"), Text("f", "here")]
    together = SampleEncoder(tokenizer, 100).encode(samples)
    assert together == [encode(tokenizer, sample, 100) for sample in samples]


@pytest.mark.parametrize(
    ("num_characters", "lengths"),
    [(3, [4]), (4, [4]), (5, [4, 2]), (7, [4, 4]), (8, [4, 4]), (1, [2])],
)
def test_stream_blocks(tokenizer: PreTrainedTokenizerFast, num_characters: int, lengths: list[int]) -> None:
    text = "pqrstuvwxyz"[:num_characters]
    blocks = list(SampleEncoder(tokenizer, 4).encode_stream(text))
    assert [len(block.input_ids) for block in blocks] == lengths
    joined = [token for block in blocks for token in block.input_ids]
    assert joined == [BOS, *ids_of(text)][: sum(lengths)]
    assert all(block.labels == block.input_ids for block in blocks)


PLAIN = (
    "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
NO_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TURNS = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "aab?"},
    {"role": "assistant", "content": "baab\nb "},
    {"role": "user", "content": "More"},
    {"role": "assistant", "content": "b"},
)


def trained_text(tokenizer: PreTrainedTokenizerFast, encoded: EncodedSample) -> str:
    return tokenizer.decode([label for label in encoded.labels if label != MASKED])


@pytest.mark.parametrize("num_turns", [3, 5])
@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_messages_agree_with_transformers(make_tokenizer: MakeTokenizer, template: str, num_turns: int) -> None:
    turns = TURNS[:num_turns]
    reference = make_tokenizer(chat_template=MARKED).apply_chat_template(
        list(turns), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    encoded = encode(make_tokenizer(chat_template=template), Conversation(turns, "here"))
    assert encoded.input_ids == reference["input_ids"]
    assert [int(label != MASKED) for label in encoded.labels] == reference["assistant_masks"]
    assert all(label in (token, MASKED) for label, token in zip(encoded.labels, encoded.input_ids, strict=True))


def test_messages_with_a_template_without_generation_prompt(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(chat_template=BRACKETS)
    encoded = encode(tokenizer, Conversation(TURNS[1:], "here"))
    whole = tokenizer.apply_chat_template(list(TURNS[1:]), tokenize=True, return_dict=True)["input_ids"]
    assert encoded.input_ids == whole
    assert trained_text(tokenizer, encoded) == " baab\nb </s> b</s>"


def test_messages_with_an_open_end_get_eos(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(chat_template=NO_END)
    encoded = encode(tokenizer, Conversation(TURNS[1:3], "here"))
    assert tokenizer.decode(encoded.input_ids) == "user: aab?\nassistant: baab\nb \n</s>"
    assert trained_text(tokenizer, encoded) == "baab\nb \n</s>"


def test_messages_truncated(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(chat_template=PLAIN)
    full = encode(tokenizer, Conversation(TURNS, "here"))
    cut = encode(tokenizer, Conversation(TURNS, "here"), 60)
    assert cut.input_ids == full.input_ids[:60]
    assert cut.labels == full.labels[:60]
    assert cut.is_truncated and not full.is_truncated


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", r"refuses the conversation: roles must alternate"),
        (
            "{% generation %}{{ raise_exception('no system') }}{% endgeneration %}",
            r"refuses the conversation: no system",
        ),
        ("{{ messages[-1].content }}<|end|>", r"renders a turn differently once later ones follow"),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", r"leaves out"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}", r"does not mark it"),
    ],
)
def test_templates_that_cannot_be_used(make_tokenizer: MakeTokenizer, template: str, message: str) -> None:
    tokenizer = make_tokenizer(chat_template=template)
    with pytest.raises(UserError, match=rf"rows\.jsonl, line 3: the chat template .*{message}"):
        encode(tokenizer, Conversation(TURNS, "rows.jsonl, line 3"))


def test_tokenizer_without_eos(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"has no EOS token, so the model could not learn to stop"):
        SampleEncoder(tokenizer, 8)


def test_sequence_length_too_short(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"data\.sequence_length is 1, expected at least 2"):
        SampleEncoder(tokenizer, 1)


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_conversations_above_the_tokenizers_limit_do_not_warn(
    make_tokenizer: MakeTokenizer, caplog: pytest.LogCaptureFixture, template: str
) -> None:
    tokenizer = make_tokenizer(chat_template=template)
    assert len(encode(tokenizer, Conversation(TURNS, "here")).input_ids) > tokenizer.model_max_length
    assert caplog.records == []
