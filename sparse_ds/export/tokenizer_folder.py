"""The tokenizer of a run that names its chat template: the base's files with that template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from sparse_ds.checkpoint.atomic_folder import atomic_folder
from sparse_ds.model.base_checkpoint import TOKENIZER_FILES

TEMPLATE_FILE = "chat_template.jinja"
_CONFIG_FILE = "tokenizer_config.json"


def write_tokenizer(base_folder: Path, folder: Path, chat_template: str) -> None:
    """Copy the base's tokenizer with another chat template; all of it or nothing, over an older one.

    Args:
        base_folder: holds the base's tokenizer.
        folder: to make.
        chat_template: Jinja text; what transformers then uses.
    """
    with atomic_folder(folder, marker=TEMPLATE_FILE, overwrite=True) as partial:
        for name in TOKENIZER_FILES:
            if (base_folder / name).is_file():
                shutil.copyfile(base_folder / name, partial / name)
        config_path = partial / _CONFIG_FILE
        if config_path.is_file():
            # Older programs read the template from here.
            config = json.loads(config_path.read_text(encoding="utf-8"))
            config["chat_template"] = chat_template
            config_path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (partial / TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")
