"""Every kind of file gives the same rows with the right places, and every broken one names its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset

from sparse_ds.config.errors import UserError
from sparse_ds.data.reading import ROW_READERS, read_text

ROWS = [{"prompt": 'one\ntwo, "x"', "completion": "é"}, {"prompt": "", "completion": "b"}]


def rows_of(path: Path) -> list[tuple[dict, str]]:
    return [(dict(row.fields), row.location) for row in ROW_READERS[path.suffix](path)]


def places(path: Path, kind: str, *numbers: int) -> list[str]:
    return [f"{path}, {kind} {number}" for number in numbers]


def check(path: Path, kind: str, *numbers: int) -> None:
    rows = rows_of(path)
    assert [fields for fields, _ in rows] == ROWS
    assert [place for _, place in rows] == places(path, kind, *numbers)


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(b"\xef\xbb\xbf" + f"{json.dumps(ROWS[0])}\r\n\r\n{json.dumps(ROWS[1])}".encode())
    check(path, "line", 1, 3)


def test_json_array(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    check(path, "line", 2, 6)


@pytest.mark.parametrize("text", ["[]", " [ ]\n"])
def test_json_array_without_elements(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    assert rows_of(path) == []


@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".tsv", "\t")])
def test_csv(tmp_path: Path, suffix: str, separator: str) -> None:
    path = tmp_path / f"rows{suffix}"
    text = 'prompt,completion\r\n"one\ntwo, ""x""",é\r\n\r\n"",b\r\n'
    if separator == "\t":
        text = text.replace("prompt,", "prompt\t").replace('""",', '"""\t').replace('"",b', '""\tb')
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    check(path, "line", 2, 5)


def test_csv_field_longer_than_the_modules_limit(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text\n" + "a" * 200_000 + "\n")
    assert len(rows_of(path)[0][0]["text"]) == 200_000


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    Dataset.from_list(ROWS).to_parquet(path)
    check(path, "row", 1, 2)


def test_text_without_byte_order_mark_and_carriage_returns(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert read_text(path) == "one\ntwo\n"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": }\n', r"a\.jsonl, line 3: broken JSON: Expecting value \(column 10\)"),
        ("a.jsonl", b'{"text": "x"}\n["x"]\n', r"line 2: a sample is an array, expected a JSON object"),
        ("a.jsonl", b'"x"\n', r"line 1: a sample is a string"),
        ("a.jsonl", b"null\n", r"line 1: a sample is null"),
        ("a.jsonl", b"3\n", r"line 1: a sample is a number"),
        ("a.jsonl", b"true\n", r"line 1: a sample is a boolean"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "caf\xe9"}\n', r"line 2: not UTF-8 \(byte 0xe9\).*iconv"),
        ("a.json", b'{\n"data": []\n}', r"line 1: broken JSON.*Expected an array of objects .* or one object a line"),
        (
            "a.json",
            b'[{"text": "x"},\n {"text": "y"\n',
            r"line 3: broken JSON: .* in the array element that starts on line 2",
        ),
        ("a.json", b'[{"text": "x"},\n\n 5]', r"line 3: a sample is a number"),
        ("a.json", b'[{"text": "x"}\n {"text": "y"}]', r"line 1: broken JSON: a comma or the closing \] is missing"),
        ("a.json", b'[{"text": "x"}', r"line 1: broken JSON: a comma or the closing \] is missing"),
        ("a.json", b'[{"text": "x"}]\n{}', r"line 2: broken JSON: text after the closing \]"),
        ("a.json", b'[{"text":\n"caf\xe9"}]', r"line 2: not UTF-8"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", r"line 3: 3 fields, expected 2 as in the header \(a, b\)"),
        ("a.csv", b'a,b\n1,"2\n', r"line 2: broken record: unexpected end of data"),
        ("a.csv", b'a,b\n1,"2\n3,4\n5,6\n', r"line 2: broken record, with all lines up to 4: unexpected end of data"),
        ("a.csv", b'a,b\n1,"2"x\n', r"line 2: broken record: .*RFC 4180"),
        ("a.csv", b"a,,c\n1,2,3\n", r"line 1: column 2 of the header has no name"),
        ("a.csv", b"a,b,a\n1,2,3\n", r"line 1: the header names a more than once"),
        ("a.csv", b"a,b\n1,\xff\n", r"line 2: not UTF-8 \(byte 0xff\)"),
        ("a.parquet", b"no parquet at all", r"a\.parquet cannot be read as Parquet: .*complete"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        rows_of(path)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"one\ntwo\ncaf\xe9\n")
    with pytest.raises(UserError, match=r"text\.txt, line 3: not UTF-8 \(byte 0xe9\)"):
        read_text(path)
