"""What a model writes, greedily, on any number of ranks in step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteriaList

from sparse_ds.distributed.process_group import gather, rank, world_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str],
    batch_size: int,
    device: torch.device,
) -> list[str]:
    """Greedy answers in the order of `prompts`, on every rank.

    Batches are as in `likelihood.score_texts`. An answer ends at an EOS token (the tokenizer's, or one of the model's
    own settings), at a text of `stop`, neither of which it keeps, or after `max_new_tokens`. The answers of a batch may
    end at different places, and so may the batches of the ranks: a rank whose batch has ended goes on with forward
    passes that count nothing until all have (`synced_gpus` of transformers).

    Args:
        model: with `generate`; it is left in the mode in which it was.
        tokenizer: the model's.
        prompts: token ids, at least one prompt.
        max_new_tokens: the longest answer, in tokens.
        stop: texts that end an answer.
        batch_size: prompts of one forward pass; they are padded on the left.
        device: of the model.

    Collectives: those of ZeRO-3's forward and one small all-reduce per token, then a gather of the answers; every rank
    must call it.
    """
    order = sorted(range(len(prompts)), key=lambda number: (-len(prompts[number]), number))
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    eos_ids = _eos_token_ids(model, tokenizer)
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_ids[0]
    answers: dict[int, str] = {}
    was_training = model.training
    model.eval()
    for round_start in range(0, len(batches), world_size()):
        index = round_start + rank()
        batch = batches[index] if index < len(batches) else batches[-1][:1]
        longest = max(len(prompts[number]) for number in batch)
        input_ids_BT = torch.full((len(batch), longest), pad_token_id, dtype=torch.int64)
        attention_mask_BT = torch.zeros_like(input_ids_BT)
        for row, number in enumerate(batch):
            ids = torch.tensor(list(prompts[number]))
            input_ids_BT[row, longest - len(ids) :] = ids
            attention_mask_BT[row, longest - len(ids) :] = 1
        output_BT = model.generate(
            input_ids=input_ids_BT.to(device),
            attention_mask=attention_mask_BT.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            synced_gpus=world_size() > 1,
            eos_token_id=eos_ids,
            pad_token_id=pad_token_id,
            stopping_criteria=StoppingCriteriaList([_stops_at(tokenizer, stop, longest)] if stop else []),
        )
        if index < len(batches):
            for row, number in enumerate(batch):
                answers[number] = _text(tokenizer, output_BT[row, longest:].tolist(), eos_ids, stop)
    model.train(was_training)
    merged = {number: answer for part in gather(answers) for number, answer in part.items()}
    return [merged[number] for number in range(len(prompts))]


def _stops_at(
    tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], prompt_length: int
) -> Callable[..., torch.Tensor]:
    """Which rows hold a text of `stop` behind the prompt. (transformers' own `stop_strings` match token by token, and
    fail on tokenizers whose tokens are whole words.)"""

    def holds_stop(input_ids_BT: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        texts = tokenizer.batch_decode(input_ids_BT[:, prompt_length:], skip_special_tokens=True)
        return torch.tensor([any(each in text for each in stop) for text in texts], device=input_ids_BT.device)

    return holds_stop


def _eos_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's, then those of the model's generation settings (a chat model's end of turn)."""
    settings = getattr(model, "generation_config", None)
    own = None if settings is None else settings.eos_token_id
    found = [tokenizer.eos_token_id, *(own if isinstance(own, list | tuple) else [own])]
    return list(dict.fromkeys(token for token in found if token is not None))


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], eos_ids: Sequence[int], stop: Sequence[str]) -> str:
    end = next((position for position, token in enumerate(ids) if token in eos_ids), len(ids))
    text = str(tokenizer.decode(list(ids[:end]), skip_special_tokens=True))
    return text[: min((text.find(each) for each in stop if each in text), default=len(text))]
