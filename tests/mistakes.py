"""What is done to the files that a run starts from, so that it has something to refuse."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def text(name: str, content: bytes | str) -> Callable[[], object]:
    """Prepare a file of this content."""
    data = content.encode() if isinstance(content, str) else content
    return lambda: Path(name).write_bytes(data)


def jsonl(*values: object) -> Callable[[], object]:
    return text("docs.jsonl", "".join(json.dumps({"text": value}) + "\n" for value in values))


def labelled(*labels: object, **changed: object) -> Callable[[], object]:
    """Prepare a file of texts in pairs with these labels; `changed` are cells of the second row."""

    def prepare() -> None:
        rows = [{"sentence1": f"text {i}", "sentence2": "more", "label": label} for i, label in enumerate(labels)]
        rows[1] |= changed
        Path("docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return prepare


def in_turn(*steps: Callable[[], object]) -> Callable[[], object]:
    def prepare() -> None:
        for step in steps:
            step()

    return prepare


def edit(name: str, **changes: object) -> Callable[[], object]:
    """Change entries of a JSON file."""
    return lambda: Path(name).write_text(json.dumps(json.loads(Path(name).read_text()) | changes))


def without(name: str) -> Callable[[], object]:
    """Remove a special token from the tokenizer of the model `bert`."""

    def prepare() -> None:
        path = Path("bert/tokenizer_config.json")
        config = json.loads(path.read_text())
        config.pop(name)
        path.write_text(json.dumps(config))

    return prepare


def truncated(name: str) -> Callable[[], object]:
    def prepare() -> None:
        import pandas

        rows = pandas.DataFrame({"text": Path("docs.txt").read_text().splitlines()})
        if name.endswith(".parquet"):
            rows.to_parquet(name, row_group_size=20)
        else:
            rows.to_json(name, orient="records", lines=True)
        os.truncate(name, Path(name).stat().st_size - 9)

    return prepare


def saved_dataset(name: str) -> None:
    """The documents in a folder as the datasets library saves them."""
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": Path("docs.txt").read_text().splitlines()}).save_to_disk(name)
    datasets.enable_progress_bars()


def truncated_dataset() -> None:
    saved_dataset("saved")
    os.truncate("saved/data-00000-of-00001.arrow", 900)


def damaged_row_group() -> None:
    """Write three row groups. The second has a page of zeros."""
    import pandas
    from pyarrow import parquet

    rows = pandas.DataFrame({"text": [f"{line} {line}" for line in Path("docs.txt").read_text().splitlines()]})
    rows.to_parquet("docs.parquet", row_group_size=20)
    offset = parquet.ParquetFile("docs.parquet").metadata.row_group(1).column(0).data_page_offset
    with open("docs.parquet", "r+b") as file:
        file.seek(offset)
        file.write(bytes(40))


def pickled_weights() -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file("bert/model.safetensors"), "bert/pytorch_model.bin")
    os.unlink("bert/model.safetensors")


def no_room() -> None:
    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000)


def no_permission() -> None:
    """Make a folder that cannot be written. The superuser could write it, and becomes another user."""
    for path in (Path.cwd().parent.parent, Path.cwd().parent):
        path.chmod(0o755)
    for path in Path.cwd().rglob("*"):
        path.chmod(0o755)
    Path.cwd().chmod(0o555)
    if os.geteuid() == 0:
        os.setegid(65534)
        os.seteuid(65534)


def cached_model() -> None:
    """The model `bert` in the cache of the hub, as some/cached."""
    folder = Path(os.environ["HF_HOME"], "hub", "models--some--cached")
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    shutil.copytree("bert", folder / "snapshots" / ("0" * 40))


def no_bf16() -> None:
    import minilm.distributed.precision

    minilm.distributed.precision.gemm_rate = lambda dtype, *rest: 1e9 if "bfloat16" in str(dtype) else 1e11


def no_peft() -> None:
    import importlib.util

    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, package=None: None if name == "peft" else find(name, package)


def lower_cased() -> None:
    """The tokenizer in `gpt2`, which makes texts lower-case now."""
    path = Path("gpt2", "tokenizer.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "Lowercase"}}))
