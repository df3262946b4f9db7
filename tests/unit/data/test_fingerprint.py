"""The same samples have the same fingerprint, and no others."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, Features, List, Value, concatenate_datasets

from sparse_ds.data.fingerprint import dataset_fingerprint

ROWS: list[dict[str, Any]] = [
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "label": 0},
    {"input_ids": [4], "labels": [4], "label": 1},
    {"input_ids": [5, 6], "labels": [5, 6], "label": 0},
]


def dataset(rows: list[dict[str, Any]], width: str = "int32") -> Dataset:
    lists = List(Value(width))
    return Dataset.from_list(rows, features=Features({"input_ids": lists, "labels": lists, "label": Value("int32")}))


def test_chunks_and_widths_have_no_effect() -> None:
    whole = dataset_fingerprint(dataset(ROWS))
    assert dataset_fingerprint(concatenate_datasets([dataset(ROWS[:1]), dataset(ROWS[1:])])) == whole
    assert dataset_fingerprint(dataset([*ROWS, *ROWS]).select(range(3))) == whole
    assert dataset_fingerprint(dataset([ROWS[2], *ROWS]).select([1, 2, 3])) == whole
    assert dataset_fingerprint(dataset(ROWS, "int64")) == whole
    assert dataset_fingerprint(dataset(ROWS * 1001)) == dataset_fingerprint(
        concatenate_datasets([dataset(ROWS)] * 1001)
    )


def test_every_change_is_seen() -> None:
    def changed(row: int, **values: Any) -> Dataset:
        return dataset([{**each, **values} if number == row else each for number, each in enumerate(ROWS)])

    others = [
        dataset(ROWS[:2]),
        dataset(ROWS[::-1]),
        dataset(ROWS).remove_columns("label"),
        dataset(ROWS).rename_column("label", "lebal"),
        changed(0, input_ids=[1, 2, 4]),
        changed(0, labels=[2, 2, 3]),
        changed(2, label=1),
        # The same numbers cut elsewhere.
        dataset([{**ROWS[0], "input_ids": [1, 2]}, {**ROWS[1], "input_ids": [3, 4]}, ROWS[2]]),
    ]
    assert len({dataset_fingerprint(each) for each in [dataset(ROWS), *others]}) == len(others) + 1
