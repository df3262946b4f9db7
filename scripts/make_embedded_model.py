#!/usr/bin/env python3
"""Make the embedded default: a small pretrained Llama, its tokenizer and an instruction task, from nothing.

    python scripts/make_embedded_model.py            # everything: about 9 minutes on one core
    python scripts/make_embedded_model.py --steps 50 --output /tmp/try

Four products, all written under ``sparse_ds/embedded/`` and all derived from one seed and the word lists below:

1. a synthetic English corpus (not saved): who has what, who is where, colours, opposites, counting, sums, days, lists;
2. ``tiny_llama/tokenizer.*``: sentencepiece BPE with byte fallback, and the same tokenizer as transformers loads it;
3. ``tiny_llama/model.safetensors``: a Llama pretrained on the corpus, saved in bf16;
4. ``instructions_{train,eval}.jsonl``: Alpaca rows about the same words and facts.

The pretraining text states facts and never gives an order; the rows are orders. So the base knows the words and the
facts and rambles when it is instructed, and a short fine-tuning, dense or sparse, visibly teaches it to answer.
"""

# ruff: noqa: SIM905 (word lists read best as text)

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import random
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import sentencepiece
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaTokenizer

from sparse_ds.data.templates import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT, alpaca_prompt

MAX_WEIGHTS_BYTES = 2_000_000
MAX_ROWS_BYTES = 500_000
MAX_ROW_TOKENS = 128
VOCAB_SIZE = 896
MAX_POSITIONS = 512
HELD_OUT_KEYS = 7  # one key in seven is held out
TRAIN_ROWS_PER_EVAL_ROW = 12
PRETRAIN_SEQUENCE_TOKENS = 128
PRETRAIN_BATCH_ROWS = 16

NAMES = "Tom Anna Ben Lily Sam Mia Max Eva Leo Nora Paul Rosa Jack Emma Finn Ida".split()
COLOURS = "red blue green yellow black white brown pink purple grey".split()
OBJECTS = (
    "ball cup hat box book pen bag key lamp chair coat shoe bell drum kite boat ring spoon "
    "clock plate doll map coin rope"
).split()
PLACES = "garden kitchen park house school forest shop barn room town field tent".split()
ANIMALS = "dog cat cow horse bird fish sheep duck pig mouse frog hen".split()
NUMBERS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
OPPOSITE_PAIRS = [
    tuple(pair.split())
    for pair in (
        "hot cold, big small, up down, day night, open shut, fast slow, happy sad, old new, left right, in out, "
        "high low, wet dry, hard soft, light dark, full empty, good bad, rich poor, long short, thick thin, "
        "clean dirty, early late, near far, strong weak, loud quiet, first last, sweet sour, win lose, give take, "
        "come go, buy sell, start stop, yes no, love hate, true false, wide narrow, black white"
    ).split(", ")
]
OPPOSITES = [pair for a, b in OPPOSITE_PAIRS for pair in ((a, b), (b, a))]
COLOUR_FACTS = [
    tuple(fact.rsplit(" ", 1))
    for fact in (
        "grass green, snow white, coal black, the sky blue, the sun yellow, blood red, leaves green, milk white, "
        "lemons yellow, mud brown, the night black, cherries red, the sea blue, peas green, smoke grey, "
        "plums purple, roses pink, bread brown, stone grey, butter yellow, tomatoes red, ink blue, "
        "salt white, bears brown"
    ).split(", ")
]
KINDS = [
    *((f"a {word}", "an animal") for word in ANIMALS),
    *((f"a {word}", "a thing") for word in OBJECTS),
    *((f"a {word}", "a place") for word in PLACES),
    *((word, "a colour") for word in COLOURS),
    *((word, "a number") for word in NUMBERS),
    *((word, "a day") for word in DAYS),
]
LIST_WORDS = [*COLOURS, *OBJECTS, *ANIMALS, *PLACES]
REPEATED_WORDS = [*LIST_WORDS, *(word for pair in OPPOSITE_PAIRS[:-1] for word in pair)]
TAUGHT_WORDS = [*NAMES, *LIST_WORDS, *NUMBERS, *DAYS, *(word for pair in OPPOSITE_PAIRS for word in pair)]

Row = tuple[str, str, str, str]
"""(key, instruction, input, output); rows with equal keys are all held out or all trained on."""


def capitalize(text: str) -> str:
    """``text`` with a capital first letter, the rest unchanged (``str.capitalize`` would lower it)."""
    return text[0].upper() + text[1:]


SUCCESSORS = [
    *(("number", a, b) for a, b in itertools.pairwise(NUMBERS)),
    *(("day", a, b) for a, b in itertools.pairwise([*DAYS, DAYS[0]])),
]


# ------------------------------------------------------------------------------------------------ pretraining text


def spoken_list(words: list[str]) -> str:
    return ", ".join(words)


def draw_passage(rng: random.Random, num_people: int) -> tuple[list[str], list[tuple[str, str, str, str]]]:
    """Invent a situation and tell it.

    Returns:
        The sentences that introduce it, and what they say: (name, kind, first, second) with kind ``has`` (colour,
        object) or ``is`` (place, "").
    """
    names = rng.sample(NAMES, num_people)
    objects, colours, places = (rng.sample(words, num_people) for words in (OBJECTS, COLOURS, PLACES))
    facts = []
    for name, thing, colour, place in zip(names, objects, colours, places, strict=True):
        facts.append((name, "has", colour, thing) if rng.random() < 0.6 else (name, "is", place, ""))
    sentences = [
        f"{name} has a {first} {second}." if kind == "has" else f"{name} is in the {first}."
        for name, kind, first, second in facts
    ]
    return sentences, facts


def tell_story(rng: random.Random) -> str:
    """Two or three people, what they have and where they are; then the same facts again in other words."""
    sentences, facts = draw_passage(rng, rng.choice((2, 2, 3)))
    for name, kind, first, second in rng.sample(facts, len(facts)):
        other = rng.choice([n for n in NAMES if n != name])
        if kind == "has":
            recaps = [
                f"The {second} is {first}.",
                f"The colour of the {second} is {first}.",
                f"{name} has the {second}.",
                f"{name} has a {first} {second}.",
                f"The {second} belongs to {name}.",
                f"{other} asked who has the {second}, and it was {name}.",
                f"{other} asked what colour the {second} was, and it was {first}.",
            ]
        else:
            recaps = [
                f"{name} is in the {first}.",
                f"{name} stays in the {first}.",
                f"In the {first} is {name}.",
                f"{other} asked where {name} is, and it was the {first}.",
                f"{other} asked who is in the {first}, and it was {name}.",
            ]
        sentences += rng.sample(recaps, rng.choice((2, 3)))
    return " ".join(sentences)


def tell_counting(rng: random.Random) -> str:
    start = rng.randrange(len(NUMBERS) - 1)
    numbers = NUMBERS[start : start + rng.randint(2, 8)]
    name = rng.choice(NAMES)
    separator = rng.choice((" ", "\n"))
    opening = rng.choice(
        (
            f"{name} can count from {numbers[0]} to {numbers[-1]}:",
            f"From {numbers[0]} to {numbers[-1]} it goes like this:",
        )
    )
    return f"{opening}{separator}{spoken_list(numbers)}."


def tell_repetition(rng: random.Random) -> str:
    word, times, name = rng.choice(REPEATED_WORDS), rng.randint(2, 6), rng.choice(NAMES)
    separator = rng.choice((" ", "\n"))
    opening = rng.choice(
        (
            f"{name} said the word {word} {NUMBERS[times - 1]} times:",
            f"The song of {name} has {NUMBERS[times - 1]} times {word}:",
        )
    )
    return f"{opening}{separator}{' '.join([word] * times)}."


def tell_list(rng: random.Random) -> str:
    words, name = rng.sample(LIST_WORDS, rng.randint(3, 4)), rng.choice(NAMES)
    sentences = [
        f"The first word is {words[0]}.",
        f"The last word is {words[-1]}.",
        f"Backwards it goes {spoken_list(words[::-1])}.",
        f"The list backwards:\n{spoken_list(words[::-1])}.",
        f"Again it goes {spoken_list(words)}.",
    ]
    return " ".join([f"{name} wrote a list: {spoken_list(words)}.", *rng.sample(sentences, 2)])


def tell_opposite(rng: random.Random) -> str:
    a, b = rng.choice(OPPOSITES)
    return rng.choice(
        (
            f"The opposite of {a} is {b}.",
            f"{capitalize(a)} and {b} are opposites.",
            f"What is not {a} is {b}.",
            f"{rng.choice(NAMES)} looked for the opposite of {a}. The opposite of {a} is {b}.",
        )
    )


def tell_colour(rng: random.Random) -> str:
    thing, colour = rng.choice(COLOUR_FACTS)
    return rng.choice(
        (
            f"The colour of {thing} is {colour}.",
            f"{rng.choice(NAMES)} knows that the colour of {thing} is {colour}.",
            f"{rng.choice(NAMES)} saw {thing}. The colour of {thing} is {colour}.",
        )
    )


def tell_sum(rng: random.Random) -> str:
    a, b = rng.randint(1, 10), rng.randint(1, 10)
    first, second, total = NUMBERS[a - 1], NUMBERS[b - 1], NUMBERS[a + b - 1]
    return rng.choice(
        (
            f"The sum of {first} and {second} is {total}.",
            f"{rng.choice(NAMES)} knows that {first} plus {second} is {total}.",
            f"{rng.choice(NAMES)} had {first} and then {second}. The sum of {first} and {second} is {total}.",
        )
    )


def tell_successor(rng: random.Random) -> str:
    kind, a, b = rng.choice(SUCCESSORS)
    return rng.choice(
        (
            f"The {kind} after {a} is {b}.",
            f"After {a} comes {b}.",
            f"{rng.choice(NAMES)} looked at {a}. The {kind} after {a} is {b}.",
        )
    )


def tell_kind(rng: random.Random) -> str:
    thing, kind = rng.choice(KINDS)
    return rng.choice((f"{capitalize(thing)} is {kind}.", f"{rng.choice(NAMES)} knows that {thing} is {kind}."))


TELLERS: list[tuple[Callable[[random.Random], str], int]] = [
    (tell_story, 36),
    (tell_list, 20),
    (tell_repetition, 10),
    (tell_counting, 6),
    (tell_opposite, 12),
    (tell_colour, 6),
    (tell_sum, 12),
    (tell_successor, 5),
    (tell_kind, 5),
]


def generate_documents(rng: random.Random) -> Iterator[str]:
    """Endless pretraining documents of one to four paragraphs."""
    tellers, weights = zip(*TELLERS, strict=True)
    while True:
        paragraphs = [teller(rng) for teller in rng.choices(tellers, weights, k=rng.randint(1, 4))]
        yield rng.choice((" ", "\n")).join(paragraphs)


# ------------------------------------------------------------------------------------------------ instruction rows


def ask_passage(rng: random.Random) -> Row:
    sentences, facts = draw_passage(rng, 2)
    passage = " ".join(sentences)
    name, kind, first, second = rng.choice(facts)
    if kind == "has":
        question, answer = rng.choice(
            (
                (f"Who has the {second}?", f"The {second} belongs to {name}."),
                (f"What colour is the {second}?", f"The {second} is {first}."),
                (f"What does {name} have?", f"A {first} {second}."),
            )
        )
    else:
        question, answer = rng.choice(
            (
                (f"Where is {name}?", f"In the {first}."),
                (f"Who is in the {first}?", f"In the {first} is {name}."),
            )
        )
    return f"{question} {passage}", question, passage, answer


def ask_counting(rng: random.Random) -> Row:
    start = rng.randrange(len(NUMBERS) - 1)
    numbers = NUMBERS[start : start + rng.randint(2, 8)]
    order = rng.choice(
        ("Count from {} to {}.", "Write the numbers from {} to {}.", "Name the numbers from {} to {}.")
    ).format(numbers[0], numbers[-1])
    return f"count {numbers[0]} {numbers[-1]}", order, "", spoken_list(numbers) + "."


def ask_repetition(rng: random.Random) -> Row:
    word, times = rng.choice(REPEATED_WORDS), rng.randint(2, 6)
    order = rng.choice(("Repeat the word {} {} times.", "Write the word {} {} times.")).format(word, NUMBERS[times - 1])
    return f"repeat {word} {times}", order, "", " ".join([word] * times) + "."


def ask_list(rng: random.Random) -> Row:
    words = rng.sample(LIST_WORDS, rng.randint(3, 4))
    order, answer = rng.choice(
        (
            ("What is the first word of the list?", f"The first word is {words[0]}."),
            ("What is the last word of the list?", f"The last word is {words[-1]}."),
            ("Write the list backwards.", spoken_list(words[::-1]) + "."),
        )
    )
    return f"{order} {words}", order, spoken_list(words), answer


def ask_opposite(rng: random.Random) -> Row:
    a, b = rng.choice(OPPOSITES)
    order = rng.choice(("What is the opposite of {}?", "Give the opposite of {}.", "Write the opposite of {}.")).format(
        a
    )
    return f"opposite {min(a, b)}", order, "", f"The opposite of {a} is {b}."


def ask_colour(rng: random.Random) -> Row:
    thing, colour = rng.choice(COLOUR_FACTS)
    order = rng.choice(("What is the colour of {}?", "Name the colour of {}.", "Give the colour of {}.")).format(thing)
    return f"colour {thing}", order, "", f"The colour of {thing} is {colour}."


def ask_sum(rng: random.Random) -> Row:
    a, b = rng.randint(1, 10), rng.randint(1, 10)
    order = rng.choice(("What is {} plus {}?", "Add {} and {}.", "Give the sum of {} and {}.")).format(
        NUMBERS[a - 1], NUMBERS[b - 1]
    )
    answer = f"The sum of {NUMBERS[a - 1]} and {NUMBERS[b - 1]} is {NUMBERS[a + b - 1]}."
    return f"sum {a} {b}", order, "", answer


def ask_successor(rng: random.Random) -> Row:
    kind, a, b = rng.choice(SUCCESSORS)
    order = rng.choice((f"Which {kind} comes after {a}?", f"Name the {kind} after {a}.", f"Give the {kind} after {a}."))
    return f"after {a}", order, "", f"The {kind} after {a} is {b}."


def ask_kind(rng: random.Random) -> Row:
    thing, kind = rng.choice(KINDS)
    word = thing.removeprefix("a ")
    order = rng.choice(("What kind of word is {}?", "Give the kind of the word {}.")).format(word)
    return f"kind {word}", order, "", f"It is {kind}."


ASKERS: list[tuple[Callable[[random.Random], Row], int]] = [
    (ask_passage, 900),
    (ask_list, 360),
    (ask_repetition, 260),
    (ask_counting, 200),
    (ask_opposite, 150),
    (ask_colour, 54),
    (ask_sum, 190),
    (ask_successor, 54),
    (ask_kind, 80),
]
"""Task and number of training rows; about a twelfth as many are held out."""


def generate_instructions(rng: random.Random) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training and held-out rows: no key is in both, and no row occurs twice."""
    rows: dict[bool, list[dict[str, str]]] = {False: [], True: []}
    for ask, num_train in ASKERS:
        missing = {False: num_train, True: math.ceil(num_train / TRAIN_ROWS_PER_EVAL_ROW)}
        seen: set[str] = set()
        for _ in range(200 * num_train):
            key, instruction, context, output = ask(rng)
            held_out = zlib.crc32(key.encode()) % HELD_OUT_KEYS == 0
            if missing[held_out] and (text := f"{instruction} {context}") not in seen:
                seen.add(text)
                missing[held_out] -= 1
                rows[held_out].append({"instruction": instruction, "input": context, "output": output})
        assert not any(missing.values()), f"{ask.__name__}: the word lists allow {missing} fewer rows"
    for part in rows.values():
        rng.shuffle(part)
    return rows[False], rows[True]


def format_prompt(row: dict[str, str]) -> str:
    """What a run on Alpaca rows puts before the answer; the model never sees it before fine-tuning."""
    return alpaca_prompt(row["instruction"], row["input"])


# ------------------------------------------------------------------------------------------------ tokenizer


def train_tokenizer(folder: Path, rows: list[dict[str, str]], rng: random.Random) -> LlamaTokenizer:
    """Train sentencepiece on corpus, rows and template, and write it as ``tokenizer.model`` and ``tokenizer.json``.

    The template is repeated so that it stays short in tokens, the word lists so that each word is a token or two.

    No space is put in front of a text (``add_dummy_prefix=False``), so tokens of prompt + completion are the tokens of
    the prompt followed by those of the completion.
    """
    documents = list(itertools.islice(generate_documents(rng), 6000))
    templates = [ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT] * 1500
    words = sorted({word for text in [*TAUGHT_WORDS, *(thing for thing, _ in COLOUR_FACTS)] for word in text.split()})
    word_lists = [" ".join(["", *words])] * 200
    lines = [
        line
        for text in [*documents, *templates, *word_lists, *map(format_prompt, rows)]
        for line in text.split("\n")
        if line
    ]
    trained = io.BytesIO()  # a file would be named inside the model
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=trained,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(trained.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    # A sentencepiece BPE piece is worth as much as its rank: merges in the order of the piece that they make.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces[3 + 1 + 256 :]
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    tokenizer = LlamaTokenizer(
        vocab=vocab,
        merges=merges,
        pad_token="<pad>",
        add_bos_token=True,
        add_prefix_space=False,
        model_max_length=MAX_POSITIONS,
        padding_side="right",
    )
    tokenizer.save_pretrained(folder)
    reloaded = AutoTokenizer.from_pretrained(folder)
    for text in [*documents[:500], *map(format_prompt, rows[:500]), "Zoë 2 + 2 = 4\t\n  ünïcode 日本!"]:
        ids = reloaded(text, add_special_tokens=False)["input_ids"]
        assert reloaded.decode(ids) == text, f"tokenizer.json: round trip changed {text!r}"
        assert ids == processor.encode(text), f"tokenizer.json and tokenizer.model differ on {text!r}"
    return reloaded


# ------------------------------------------------------------------------------------------------ model


def pretrain(tokenizer: LlamaTokenizer, num_steps: int, learning_rate: float, rng: random.Random) -> LlamaForCausalLM:
    """Next-token training on fresh documents, packed as ``<s> document </s>``; AdamW, cosine decay, one thread."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=352,
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    num_warmup_steps = max(1, num_steps // 25)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: min((t + 1) / num_warmup_steps, 0.02 + 0.49 * (1 + math.cos(math.pi * t / num_steps))),
    )
    documents = generate_documents(rng)
    batch_tokens = PRETRAIN_BATCH_ROWS * PRETRAIN_SEQUENCE_TOKENS
    stream: list[int] = []
    started = time.perf_counter()
    for step in range(1, num_steps + 1):
        while len(stream) < batch_tokens:
            for ids in tokenizer(list(itertools.islice(documents, 64)), add_special_tokens=False)["input_ids"]:
                stream += [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
        input_ids = torch.tensor(stream[:batch_tokens]).view(PRETRAIN_BATCH_ROWS, PRETRAIN_SEQUENCE_TOKENS)
        del stream[:batch_tokens]
        loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == num_steps:
            print(f"step {step}/{num_steps}: loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    return model.eval()


@torch.no_grad()
def completion_loss(model: LlamaForCausalLM, tokenizer: LlamaTokenizer, rows: list[dict[str, str]]) -> float:
    """Mean negative log likelihood (nats) of the tokens of the outputs and their end mark, prompts not counted."""
    total, num_tokens = 0.0, 0
    for row in rows:
        prompt = [tokenizer.bos_token_id, *tokenizer(format_prompt(row), add_special_tokens=False)["input_ids"]]
        completion = [*tokenizer(row["output"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(completion), reduction="sum").item()
        num_tokens += len(completion)
    return total / num_tokens


def count_row_tokens(tokenizer: LlamaTokenizer, rows: list[dict[str, str]]) -> list[int]:
    """Tokens of each row as it is trained on: beginning mark, prompt, output, end mark."""
    texts = [format_prompt(row) + row["output"] for row in rows]
    return [len(ids) + 2 for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default_output = Path(__file__).resolve().parent.parent / "sparse_ds" / "embedded"
    parser.add_argument("--output", type=Path, default=default_output, help="folder to write (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=2600, help="pretraining steps of 2048 tokens (default: %(default)s)"
    )
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the order of floating-point sums depends on the number of threads
    torch.manual_seed(args.seed)

    train_rows, eval_rows = generate_instructions(random.Random(f"instructions {args.seed}"))
    folder = args.output / "tiny_llama"
    tokenizer = train_tokenizer(folder, train_rows, random.Random(f"tokenizer {args.seed}"))
    row_tokens = count_row_tokens(tokenizer, train_rows + eval_rows)
    assert max(row_tokens) <= MAX_ROW_TOKENS, f"the longest row has {max(row_tokens)} tokens"
    paths = {args.output / "instructions_train.jsonl": train_rows, args.output / "instructions_eval.jsonl": eval_rows}
    for path, rows in paths.items():
        write_rows(path, rows)
    rows_bytes = sum(path.stat().st_size for path in paths)
    assert rows_bytes <= MAX_ROWS_BYTES, f"the rows take {rows_bytes} bytes"
    print(f"{len(train_rows)} + {len(eval_rows)} rows, {rows_bytes} bytes, tokens a row:", end=" ")
    print(f"mean {sum(row_tokens) / len(row_tokens):.0f}, longest {max(row_tokens)}", flush=True)

    model = pretrain(tokenizer, args.steps, args.learning_rate, random.Random(f"corpus {args.seed}"))
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    weights_bytes = (folder / "model.safetensors").stat().st_size
    assert weights_bytes <= MAX_WEIGHTS_BYTES, f"model.safetensors has {weights_bytes} bytes"
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    print(
        f"{weights_bytes} bytes of weights, held-out completion loss {completion_loss(saved, tokenizer, eval_rows):.3f}"
    )


if __name__ == "__main__":
    main()
