"""What is wrong with model, data, output folder or checkpoint: found before training, in a run of one rank.

One message on standard error, exit code 2, no traceback, and no file is made, changed or removed.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_runs import FinishedRun
from forks import Ended, train_in_fork
from safetensors.torch import load_file, save_file
from short_run import RUN_ARGUMENTS, save_rows, set_words

from sparse_ds.cli import USER_ERROR_EXIT_CODE
from sparse_ds.embedded import resolve_model

Prepare = Callable[[Path], Sequence[str]]
"""Puts what is wrong into the working folder; returns the settings that name it."""

QUERY = "model.layers.1.self_attn.q_proj.weight"


def refused(arguments: Sequence[str], folder: Path, expected: str) -> Ended:
    """Runs the command, which has to end with the message and leave the folder as it is."""
    before = content_of(folder)
    ended = train_in_fork(arguments, folder)
    assert re.search(expected, ended.stderr), ended
    assert ended.exit_code == USER_ERROR_EXIT_CODE
    assert len(re.findall("^error", ended.stderr, re.MULTILINE)) == 1, ended.stderr
    assert "Traceback" not in ended.stderr + ended.stdout, ended
    assert content_of(folder) == before
    return ended


def content_of(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below one, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def with_settings(settings: Sequence[str]) -> list[str]:
    return [*RUN_ARGUMENTS, *set_words(settings)]


def copy_model(folder: Path, **changed: Any) -> Path:
    """The embedded model as `model` in a folder, with changes in its config.json (None removes a key)."""
    model = folder / "model"
    shutil.copytree(resolve_model("embedded"), model)
    path = model / "config.json"
    content = {**json.loads(path.read_text(encoding="utf-8")), **changed}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    return model


def change_tensor(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = copy_model(folder) / "model.safetensors"
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights, metadata={"format": "pt"})


# --- model


def no_such_model(folder: Path) -> list[str]:
    (folder / "llama-tiny").mkdir()
    return ["model.name_or_path=llama-tinny"]


def no_config(folder: Path) -> list[str]:
    (copy_model(folder) / "config.json").unlink()
    return ["model.name_or_path=model"]


def broken_config(folder: Path) -> list[str]:
    (copy_model(folder) / "config.json").write_text('{"model_type": "llama",')
    return ["model.name_or_path=model"]


def wrong_type_in_config(folder: Path) -> list[str]:
    copy_model(folder, hidden_size="wide")
    return ["model.name_or_path=model"]


def impossible_config(folder: Path) -> list[str]:
    copy_model(folder, hidden_act="quelu")
    return ["model.name_or_path=model"]


def no_weights(folder: Path) -> list[str]:
    (copy_model(folder) / "model.safetensors").unlink()
    return ["model.name_or_path=model"]


def no_tokenizer(folder: Path) -> list[str]:
    for path in copy_model(folder).glob("tokenizer*"):
        path.unlink()
    return ["model.name_or_path=model"]


def truncated_weights(folder: Path) -> list[str]:
    weights = copy_model(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return ["model.name_or_path=model"]


def empty_weights(folder: Path) -> list[str]:
    (copy_model(folder) / "model.safetensors").write_bytes(b"")
    return ["model.name_or_path=model"]


def index_of_missing_file(folder: Path) -> list[str]:
    model = copy_model(folder)
    names = load_file(model / "model.safetensors").keys()
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    weight_map = {name: f"model-0000{1 if 'layers' in name else 2}-of-00002.safetensors" for name in names}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return ["model.name_or_path=model"]


def nan_in_a_weight(folder: Path) -> list[str]:
    change_tensor(folder, lambda tensors: tensors[QUERY].view(-1)[77:78].fill_(float("nan")))
    return ["model.name_or_path=model"]


def infinity_outside_the_targets(folder: Path) -> list[str]:
    change_tensor(folder, lambda tensors: tensors["model.norm.weight"][3:4].fill_(float("inf")))
    return ["model.name_or_path=model"]


def wrong_shape(folder: Path) -> list[str]:
    change_tensor(folder, lambda tensors: tensors.update({QUERY: tensors[QUERY][:64].clone()}))
    return ["model.name_or_path=model"]


def missing_tensor(folder: Path) -> list[str]:
    change_tensor(folder, lambda tensors: tensors.update({f"not.{QUERY}": tensors.pop(QUERY)}))
    return ["model.name_or_path=model"]


def integer_weight(folder: Path) -> list[str]:
    change_tensor(folder, lambda tensors: tensors.update({QUERY: tensors[QUERY].to(torch.int8)}))
    return ["model.name_or_path=model"]


def unsupported_architecture(folder: Path) -> list[str]:
    copy_model(folder, model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"])
    return ["model.name_or_path=model"]


def unknown_architecture(folder: Path) -> list[str]:
    copy_model(folder, model_type="lama")
    return ["model.name_or_path=model"]


def quantized_otherwise(folder: Path) -> list[str]:
    copy_model(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    return ["model.name_or_path=model"]


def one_tensor_too_many(folder: Path) -> list[str]:
    change_tensor(folder, lambda tensors: tensors.update({"value_head.weight": torch.zeros(1, 128)}))
    return ["model.name_or_path=model"]


def remote_model(folder: Path) -> list[str]:
    copy_model(folder, model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    (folder / "model" / "configuration_own.py").write_text("raise SystemExit('ran')")
    return ["model.name_or_path=model"]


def remote_tokenizer(folder: Path) -> list[str]:
    path = copy_model(folder) / "tokenizer_config.json"
    remote = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **remote}))
    (folder / "model" / "tokenization_own.py").write_text("raise SystemExit('ran')")
    return ["model.name_or_path=model"]


MODELS: dict[str, tuple[Prepare, str]] = {
    "no such model": (
        no_such_model,
        r"model\.name_or_path: got 'llama-tinny', which is no folder .* Did you mean llama-tiny\?",
    ),
    "no config.json": (no_config, r"model\.name_or_path: model has no config\.json; expected the folder of a"),
    "broken config.json": (broken_config, r"model\.name_or_path: model/config\.json is not valid JSON"),
    "text for a size": (wrong_type_in_config, r"model\.name_or_path: .*hidden_size"),
    "unknown activation": (impossible_config, r"model\.name_or_path: .*quelu"),
    "no weights": (no_weights, r"model\.name_or_path: model holds no weights; expected model\.safetensors or pytorch_"),
    "no tokenizer": (no_tokenizer, r"model\.name_or_path: .*tokenizer"),
    "truncated weights": (
        truncated_weights,
        r"model\.name_or_path: model/model\.safetensors cannot be read .*it is truncated or damaged\. Get the file",
    ),
    "empty weights": (empty_weights, r"model\.name_or_path: model/model\.safetensors cannot be read"),
    "index of a missing file": (
        index_of_missing_file,
        r"model\.safetensors\.index\.json names 1 missing file\(s\): model-00002-of-00002\.safetensors\. Get the check",
    ),
    "NaN in a weight": (nan_in_a_weight, rf"tensor '{re.escape(QUERY)}' of model holds NaN or Inf; the checkpoint is"),
    "infinity in a norm": (infinity_outside_the_targets, r"tensor 'model\.norm\.weight' of model holds NaN or Inf"),
    "wrong shape": (wrong_shape, rf"tensor '{re.escape(QUERY)}' of model has shape \(64, 128\), expected \(128, 128\)"),
    "missing tensor": (missing_tensor, rf"model has no tensor '{re.escape(QUERY)}', which the architecture in its"),
    "integer weight": (
        integer_weight,
        rf"tensor '{re.escape(QUERY)}' of model is torch\.int8, expected a floating-point",
    ),
    "another architecture": (unsupported_architecture, r"model is a 'gpt_neox' model; expected one of llama, mistral"),
    "unknown architecture": (unknown_architecture, r"model is a 'lama' model; expected one of llama, mistral"),
    "quantized otherwise": (
        quantized_otherwise,
        r"model is quantized by 'gptq' .*expected a 16-bit checkpoint, or bits",
    ),
    "one tensor too many": (
        one_tensor_too_many,
        r"model holds 1 tensor\(s\) that the architecture .* does not have: value_head\.weight.*model\.unused_tensors",
    ),
    "remote code": (remote_model, r"is a 'own' model that needs code of its repository, and remote code is never exec"),
    "remote tokenizer": (
        remote_tokenizer,
        r"model has no tokenizer that can be loaded .*, and remote code is never exec",
    ),
}


@pytest.mark.parametrize(("prepare", "expected"), MODELS.values(), ids=MODELS.keys())
def test_a_bad_model(tmp_path: Path, prepare: Prepare, expected: str) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    save_rows(folder, 32)
    refused(with_settings(prepare(folder)), folder, expected)


# --- data and what is trained


def changed_row(number: int, row: str, name: str = "rows.jsonl") -> Prepare:
    """A row of the data replaced."""

    def prepare(folder: Path) -> list[str]:
        path = folder / "rows.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines()
        lines[number - 1] = row
        path.unlink()
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return [f"data.train={name}"]

    return prepare


def file_with(content: bytes, name: str = "bad.jsonl", field: str = "data.train") -> Prepare:
    def prepare(folder: Path) -> list[str]:
        (folder / name).write_bytes(content)
        return [f"{field}={name}"]

    return prepare


def only(*settings: str) -> Prepare:
    return lambda folder: settings


DATA: dict[str, tuple[Prepare, str]] = {
    "no such file": (only("data.train=row.jsonl"), r"data\.train: no such file: row\.jsonl\. Did you mean rows\.jsonl"),
    "no such folder": (only("data.train=data/rows.jsonl"), r"no such file: data/rows\.jsonl\. The folder data does"),
    "no such held-out file": (only("data.eval=eval.jsonl"), r"data\.eval: no such file: eval\.jsonl\."),
    "empty file": (file_with(b""), r"data\.train: bad\.jsonl is empty: it holds no sample\. Give a file"),
    "blank lines": (file_with(b"\n  \n"), r"data\.train: bad\.jsonl is empty"),
    "empty text": (file_with(b" \n", "bad.txt"), r"data\.train: bad\.txt is empty: it holds no text"),
    "empty held-out file": (file_with(b"", field="data.eval"), r"data\.eval: bad\.jsonl is empty"),
    "broken line": (changed_row(7, '{"instruction": "x", "outp'), r"rows\.jsonl, line 7: broken JSON: .*Correct"),
    "missing field": (changed_row(9, '{"instruction": "x"}'), r'rows\.jsonl, line 9: field "output" is missing;'),
    "number for text": (
        changed_row(3, '{"instruction": "x", "output": 5}'),
        r'rows\.jsonl, line 3: field "output" is int \(5\), expected text',
    ),
    "nothing to learn": (
        changed_row(4, '{"instruction": "x", "output": " "}'),
        r'rows\.jsonl, line 4: field "output" is empty, so there is nothing to learn',
    ),
    "unknown fields": (file_with(b'{"query": "a", "gold": "b"}\n'), r"no known format fits bad\.jsonl, line 1;"),
    "unknown suffix": (file_with(b"a", "bad.doc"), r"data\.train: bad\.doc has the suffix '\.doc', expected one of "),
    "not UTF-8": (file_with(b'{"text": "\xe4"}\n'), r"bad\.jsonl, line 1: not UTF-8 \(byte 0xe4\)"),
    "another format": (only("data.format=prompt_completion"), r'rows\.jsonl, line 1: field "prompt" is missing'),
    "no chat template": (only("data.format=messages"), r"data\.train: conversations need a chat template"),
    "no such template": (
        only("data.template=llama2"),
        r"data\.template: got llama2, expected auto, tokenizer, one of ",
    ),
    "a broken entry of a mixture": (
        only('data.train=[{"source":"rows.jsonl"},{"source":"row.jsonl"}]'),
        r"data\.train\[1\]\.source: no such file: row\.jsonl\. Did you mean rows\.jsonl",
    ),
    "all rows are bad": (
        lambda folder: [*file_with(b'{"text": " "}\n')(folder), "data.on_bad_row=skip"],
        r"data\.train: no usable sample in bad\.jsonl: 1 of 1 rows are left out\. The first: bad\.jsonl, line 1: field",
    ),
    "fewer samples than a batch": (
        file_with(b'{"text": "a b c"}\n' * 15),
        r"data\.train: got 15 usable samples, expected at least one global batch of 16\. Give more data or lower",
    ),
    "everything cut off": (only("data.sequence_length=4"), r"data\.train: .*data\.sequence_length"),
    "no such target": (
        only('method.target_modules=["q_prj"]'),
        r"method\.target_modules: 'q_prj' matches no linear layer of the model; expected one of .* mean 'q_proj'\?",
    ),
    "the head as a target": (only('method.target_modules=["lm_head"]'), r"method\.target_modules: 'lm_head' matches"),
    "K = 0 in a layer": (
        only("method.density=0.0001"),
        r"method\.density: 0\.0001 of the 8192 weights of model\.layers\.0\.self_attn\.k_proj is less than one weight; "
        r"expected a density of at least 0\.000123",
    ),
    "attention without its package": (
        only("model.attention=flash_attention_2"),
        r"model\.attention: got flash_attention_2, which cannot be used here .* set model\.attention to auto",
    ),
    "GPU without one": (only("train.device=cuda"), r'train\.device: got "cuda", but torch finds no GPU here; expected'),
}


@pytest.mark.parametrize(("prepare", "expected"), DATA.values(), ids=DATA.keys())
def test_bad_data_or_targets(tmp_path: Path, prepare: Prepare, expected: str) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    save_rows(folder, 32)
    refused(with_settings(prepare(folder)), folder, expected)


# --- output folder


def output_is_a_file(folder: Path) -> list[str]:
    (folder / "run").write_text("mine")
    return []


def output_holds_other_files(folder: Path) -> list[str]:
    (folder / "run").mkdir()
    (folder / "run" / "thesis.tex").write_text("mine")
    return []


def overwriting_other_files(folder: Path) -> list[str]:
    return [*output_holds_other_files(folder), "train.overwrite=true"]


def output_below_a_file(folder: Path) -> list[str]:
    (folder / "notes").write_text("mine")
    return ["train.output_dir=notes/run"]


OUTPUT_FOLDERS: dict[str, tuple[Prepare, str]] = {
    "a file": (output_is_a_file, r"train\.output_dir: run is a file; expected a folder or a new name"),
    "other files": (output_holds_other_files, r"train\.output_dir: run is not empty and holds no run of sparse_ds"),
    "other files, overwrite": (overwriting_other_files, r"train\.output_dir: run is not empty and holds no run"),
    "below a file": (output_below_a_file, r"train\.output_dir: (cannot write to notes/run|notes is a file)"),
}


@pytest.mark.parametrize(("prepare", "expected"), OUTPUT_FOLDERS.values(), ids=OUTPUT_FOLDERS.keys())
def test_a_bad_output_folder(tmp_path: Path, prepare: Prepare, expected: str) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    save_rows(folder, 32)
    refused(with_settings(prepare(folder)), folder, expected)


# --- a run that is there, and its checkpoints


@pytest.fixture
def work(tmp_path: Path, checkpointed_run: FinishedRun) -> Path:
    """A working folder that holds a finished run with its newest two checkpoints."""
    folder = tmp_path / "work"
    shutil.copytree(checkpointed_run.folder.parent, folder)
    for step in (6, 8, 10):
        shutil.rmtree(folder / "run" / f"checkpoint-{step}")
    return folder


def test_an_output_folder_with_a_run(work: Path) -> None:
    expected = r"train\.output_dir: run already holds a run\. .*train\.overwrite=true.*`--resume auto`"
    refused(with_settings([]), work, expected)


def test_resume_from_no_folder(work: Path) -> None:
    expected = r"checkpoint\.resume: 'run/checkpoint-9' is no folder; expected a checkpoint-<step> folder or `auto`"
    refused([*with_settings(["train.output_dir=new"]), "--resume", "run/checkpoint-9"], work, expected)


def test_resume_from_a_folder_that_is_no_checkpoint(work: Path) -> None:
    arguments = [*with_settings(["train.output_dir=new"]), "--resume", "run/adapter"]
    refused(arguments, work, r"checkpoint run/adapter: has no readable checkpoint\.json")


def test_resume_of_another_run(work: Path) -> None:
    arguments = [*with_settings(["train.seed=1", "method.density=0.1"]), "--resume", "auto"]
    ended = refused(arguments, work, r"resume: run/checkpoint-14 belongs to another run \(checkpoint \| this run\):\n")
    lines = ended.stderr.splitlines()
    assert "  active_weights.model.layers.0.mlp.down_proj: 2252 | 4505" in lines
    assert "  active_weights: 23 more" in lines
    assert "  method.density: 0.05 | 0.1" in lines
    assert "  seed: 0 | 1" in lines
    assert len(ended.stderr) < 1000


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["train.global_batch_size=8"], "global_batch_size: 16 | 8"),
        (['method.target_modules=["q_proj"]'], "active_weights.model.layers.0.mlp.down_proj: 2252 | None"),
        (["method.interval_steps=4"], "method.interval_steps: 5 | 4"),
        (["model.quantization=none"], "base.quantization: 'nf4' | 'none'"),
        (["model.name_or_path=model"], "base.name: 'embedded' | 'model'"),
        (["data.sequence_length=64"], "data: "),
        (["data.train=other.jsonl"], "data: "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_one_difference(work: Path, settings: list[str], line: str) -> None:
    copy_model(work)
    rows = (work / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (work / "other.jsonl").write_text("".join([rows[1], rows[0], *rows[2:]]), encoding="utf-8")
    arguments = [*with_settings([*settings, "train.max_steps=20"]), "--resume", "auto"]
    ended = refused(arguments, work, r"run/checkpoint-14 belongs to another run")
    assert any(found.startswith(f"  {line}") for found in ended.stderr.splitlines()), ended.stderr


def test_another_method(work: Path) -> None:
    kept = [word for word in RUN_ARGUMENTS if not word.startswith("zero3")][1:]
    arguments = ["--config", "zero3_sft_ag", *kept, "--resume", "auto"]
    ended = refused(arguments, work, r"run/checkpoint-14 belongs to another run")
    assert "  method.name: 'sft_ma' | 'sft_ag'" in ended.stderr.splitlines()


def test_resume_from_a_damaged_checkpoint(work: Path) -> None:
    flip_byte(work / "run" / "checkpoint-14" / "state-00001-of-00002.safetensors")
    arguments = [*with_settings(["train.output_dir=new"]), "--resume", "run/checkpoint-14"]
    refused(arguments, work, r"checkpoint run/checkpoint-14: state-00001-of-00002\.safetensors is damaged \(its sha256")


def test_resume_without_a_whole_checkpoint(work: Path) -> None:
    flip_byte(work / "run" / "checkpoint-14" / "state-00001-of-00002.safetensors")
    (work / "run" / "checkpoint-12" / "trainer_state.json").unlink()
    ended = refused(
        [*with_settings([]), "--resume", "auto"], work, r"checkpoint\.resume: auto, but run holds no whole checkpoint"
    )
    assert (
        "state-00001-of-00002.safetensors is damaged" in ended.stderr
        and "trainer_state.json is missing" in ended.stderr
    )


def test_resume_of_a_longer_run(work: Path) -> None:
    expected = r"run/checkpoint-14 is of step 14 and the run has 13 steps\. Raise train\.max_steps"
    refused([*with_settings(["train.max_steps=13"]), "--resume", "auto"], work, expected)


def test_resume_of_a_finished_run_without_a_checkpoint(work: Path) -> None:
    for step in (12, 14):
        shutil.rmtree(work / "run" / f"checkpoint-{step}")
    expected = r"checkpoint\.resume: auto, but run holds no checkpoint and a finished run \(adapter/\)\. Start anew"
    refused([*with_settings([]), "--resume", "auto"], work, expected)


def change_checkpoint(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """As somebody would who knows the format: all hashes are right."""
    path = folder / "checkpoint.json"
    content = json.loads(path.read_text())
    content.pop("sha256")
    change(content)
    for name in content["files"]:
        content["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**content, "sha256": digest}))


DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("name", "position", "value", "expected"),
    [
        (f"{DOWN}.indices", 3, -1, "holds -1, expected 0 to 45055"),
        (f"{DOWN}.indices", -1, 45056, "holds 45056, expected 0 to 45055"),
        (f"{DOWN}.indices", 5, 0, "is not in ascending order"),
        (f"{DOWN}.values", 3, float("nan"), "holds numbers that are not finite"),
        (f"{DOWN}.birth_step", 3, 15, "holds 15, expected 0 to 14"),
        (f"{DOWN}.row_accumulator", 0, -1.0, "holds numbers below 0"),
        ("ranks/num_tokens", 0, -5, "holds -5, expected 0 to"),
    ],
    ids=lambda value: str(value).rsplit(".", 1)[-1],
)
def test_tensors_that_cannot_be(work: Path, name: str, position: int, value: float, expected: str) -> None:
    folder = work / "run" / "checkpoint-14"
    path = folder / "state-00001-of-00002.safetensors"
    tensors = load_file(path)
    tensors[name][position] = value
    save_file(tensors, path)
    change_checkpoint(folder, lambda content: None)
    arguments = [*with_settings(["train.output_dir=new", "train.max_steps=20"]), "--resume", "run/checkpoint-14"]
    with_result(arguments, work, rf"checkpoint run/checkpoint-14: tensor '{re.escape(name)}' {expected}")


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["engine"]["num_active"].update({DOWN: 2253}),
        lambda state: state["engine"]["num_active"].pop(DOWN),
        lambda state: state["engine"].update(num_applied_steps=15),
        lambda state: state["engine"].update(num_counted_steps=3),
        lambda state: state["engine"].update(num_counted_steps="3"),
        lambda state: state["trainer"]["scheduler"].update(get_lr="os.system"),
        lambda state: state["trainer"]["scheduler"].update(last_epoch="14"),
        lambda state: state["trainer"]["callbacks"].update(WriteMetrics={}),
        lambda state: state["trainer"].update(epoch=1),
        lambda state: state.update(report={}),
        lambda state: state["trainer"].update(last_logged_step=15),
        lambda state: state.pop("engine"),
    ],
    ids=range(12),
)
def test_run_states_that_cannot_be(work: Path, change: Callable[[dict[str, Any]], None]) -> None:
    change_checkpoint(work / "run" / "checkpoint-14", lambda content: change(content["run_state"]))
    arguments = [*with_settings(["train.output_dir=new", "train.max_steps=20"]), "--resume", "run/checkpoint-14"]
    with_result(arguments, work, "checkpoint run/checkpoint-14: ")


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"global_step": 13}', '{"global_step": 14, "x": 1}', "[" * 100_000], ids=range(5)
)
def test_a_trainer_state_that_cannot_be(work: Path, text: str) -> None:
    (work / "run" / "checkpoint-14" / "trainer_state.json").write_text(text)
    change_checkpoint(work / "run" / "checkpoint-14", lambda content: None)
    arguments = [*with_settings(["train.output_dir=new", "train.max_steps=20"]), "--resume", "run/checkpoint-14"]
    refused(arguments, work, r"checkpoint run/checkpoint-14: trainer_state\.json is not what a run writes")


def with_result(arguments: Sequence[str], folder: Path, expected: str) -> None:
    """Found when the engine is there already: the new output folder has been made."""
    ended = train_in_fork(arguments, folder)
    assert re.search(expected, ended.stderr), ended
    assert (ended.exit_code, "Traceback" in ended.stderr) == (USER_ERROR_EXIT_CODE, False), ended
    assert not (folder / "new" / "adapter").exists()


def test_resume_from_elsewhere_into_a_folder_with_a_run(work: Path) -> None:
    shutil.copytree(work / "run", work / "other")
    arguments = [*with_settings(["train.max_steps=20"]), "--resume", "other/checkpoint-12"]
    refused(arguments, work, r"train\.output_dir: run already holds a run")


def test_overwriting_the_checkpoint_to_go_on_from(work: Path) -> None:
    arguments = [*with_settings(["train.overwrite=true", "train.max_steps=20"]), "--resume", "run/checkpoint-14"]
    expected = r"train\.overwrite: got true .* together with checkpoint\.resume run/checkpoint-14, which would be"
    refused(arguments, work, expected)


def test_resume_from_an_older_checkpoint_in_its_own_folder(work: Path) -> None:
    arguments = [*with_settings(["train.max_steps=20"]), "--resume", "run/checkpoint-12"]
    expected = r"run/checkpoint-12 is not the newest checkpoint of run: checkpoint-14 would not belong to the run"
    refused(arguments, work, expected)


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
