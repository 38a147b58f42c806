"""Saving of the model and the tokenizer in the Hugging Face format, which `from_pretrained` loads."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minilm.models.lora import has_adapter, merge_adapter, save_adapter
from minilm.utils.atomic_files import replace_files, sync_path
from minilm.utils.progress import quiet_transformers


def save_model(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: dict[str, Tensor] | None = None,
    extra: Mapping[str, str] | None = None,
) -> list[str]:
    """Save in the Hugging Face format, and return the names of the files in `folder`.

    `weights` takes the place of `network.state_dict()`. An adapter of LoRA is merged into the weights, and also saved
    separately in `adapter/`. `extra` has the text of more files by their path in `folder`. The files are written and
    synced in a temporary folder inside `folder`, then renamed into place, the weights last, so that each file is
    complete at any time.
    """
    weights = network.state_dict() if weights is None else weights
    with replace_files(folder, last=".safetensors") as temporary:
        with quiet_transformers():
            network.save_pretrained(temporary, state_dict=merge_adapter(network, weights))
            save_tokenizer(tokenizer, temporary)
        if has_adapter(network):
            save_adapter(network, weights, temporary / "adapter")
        for name, text in (extra or {}).items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        names = [str(path.relative_to(temporary)) for path in temporary.rglob("*") if path.is_file()]
    # The chat templates of an earlier model would take precedence over this one's.
    if "chat_template.jinja" not in names:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    sync_path(folder)
    return names


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save the tokenizer in the Hugging Face format, without subfolders.

    Several chat templates go into tokenizer_config.json. transformers would write them into a folder.
    """
    several = isinstance(tokenizer.chat_template, dict)
    tokenizer.save_pretrained(folder, save_jinja_files=not several)
