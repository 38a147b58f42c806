"""Damage each file of the cache in each of several ways: is the next run's data that of an undisturbed run?

python -m tests.faults.damage --pydocs
"""

import argparse
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from minilm import Batch, CausalLM, Classification, Config, Data, Tokens
from minilm.data.corpus import Examples
from minilm.data.tokenizer_state import serialize_tokenizer
from minilm.objectives.factory import prepare_data
from minilm.utils.cache import get_cache_folder
from tests.jobs import CONFIG, write_text


def cut(path: Path, other: Path) -> None:
    """Keep the first half."""
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path, other: Path) -> None:
    """Keep nothing."""
    os.truncate(path, 0)


def zero(path: Path, other: Path) -> None:
    """Put a block of zeros into the second half, as a power cut does."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(bytes(min(4096, size - size // 2)))


def flip(path: Path, other: Path) -> None:
    """Change a bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def lengthen(path: Path, other: Path) -> None:
    """Add a byte."""
    with path.open("ab") as file:
        file.write(b"\0")


def swap(path: Path, other: Path) -> None:
    """Put another entry's file of this kind in its place."""
    shutil.copyfile(other, path)


def remove(path: Path, other: Path) -> None:
    """Remove the file."""
    path.unlink()


def obstruct(path: Path, other: Path) -> None:
    """Put a folder in its place."""
    path.unlink()
    path.mkdir()


DAMAGES = (cut, empty, zero, flip, lengthen, swap, remove, obstruct)


def configs(place: Path) -> dict[str, Config]:
    """Small runs that fill the cache with every kind of entry, from files in `place`."""
    text = write_text(place / "text.txt")
    lines = Path(text).read_text().splitlines()
    rows = [{"text": line, "pair": line[::-1], "label": number % 2} for number, line in enumerate(lines)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Dataset.from_list(rows).save_to_disk(place / "saved")
    masked = replace(CONFIG, data=Data(source=text, eval_fraction=0.1))
    pairs = Data(source=str(place / "rows.jsonl"), eval_fraction=0.2, pair_column="pair")
    return {
        "masked LM with words": masked,
        "masked LM of a saved dataset": replace(masked, data=Data(source=str(place / "saved"), eval_fraction=0.1)),
        "causal LM of a stream": replace(
            masked,
            data=replace(pairs, pair_column=None, streaming=True),
            objective=CausalLM(),
            model=replace(CONFIG.model, type="gpt2", config={"n_embd": 16, "n_layer": 1, "n_head": 2}),
            batch=Batch(examples=8, max_length=24, layout="blocks"),
        ),
        "classified pairs": replace(
            masked,
            data=pairs,
            objective=Classification(),
            tokens=Tokens(kind="wordpiece", vocab_size=300),
            batch=Batch(examples=8, max_length=24),
        ),
    }


def content_of(config: Config) -> dict[str, Any]:
    """All that a run takes from its documents, as bytes and text."""
    prepared = prepare_data(config)

    def told(examples: Examples) -> list[Any]:
        arrays = (examples.ids, examples.is_word_start, examples.type_ids)
        flat = [None if array is None else np.asarray(array[0 : len(array)]).tobytes() for array in arrays]
        ends = [array.tobytes() for array in (examples.start, examples.stop, examples.prefix, examples.suffix)]
        return [*flat, *ends, np.asarray(examples.labels).tolist(), examples.fingerprint]

    return {
        "tokenizer": serialize_tokenizer(prepared.tokenizer),
        "train": told(prepared.train),
        "eval": told(prepared.eval),
        "fields": prepared.fields,
    }


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones too, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def warnings_of_minilm() -> Iterator[list[str]]:
    """What minilm warns of inside."""
    warnings: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(record.getMessage())

    logger, handler = logging.getLogger("minilm"), Handler(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield warnings
    finally:
        logger.removeHandler(handler)


def trial(
    config: Config, ways: int = len(DAMAGES), show: Callable[[str], None] = lambda line: None
) -> tuple[int, int, list[str]]:
    """Damage each file that the run has in the cache: how many files, how many damages, and what went wrong.

    Each file is damaged in so many of the ways, and the next file in the next ones.
    """
    cache = get_cache_folder()
    with warnings_of_minilm() as usual:
        right = content_of(config)
        del usual[:]
        assert content_of(config) == right
    whole, wrong, damages = files_below(cache), list[str](), 0
    # A lock file holds nothing.
    for number, name in enumerate(sorted(name for name in whole if not name.endswith(".lock"))):
        others = [other for other in whole if Path(other).name == Path(name).name and whole[other] != whole[name]]
        for damage in ([*DAMAGES] * 2 * ways)[number * ways % len(DAMAGES) :][:ways]:
            if (not others and damage is swap) or (not whole[name] and damage in (cut, empty, zero, flip)):
                continue
            # A copy, since the files may be open.
            spare = cache.with_name("other")
            spare.write_bytes(whole[others[0]] if others else b"")
            damage(cache / name, spare)
            if (cache / name).is_file() and (cache / name).read_bytes() == whole[name]:
                continue
            damages += 1
            with warnings_of_minilm() as warnings:
                try:
                    same = content_of(config) == right
                except Exception as error:
                    warnings, same = [repr(error)], False
            told = [line for line in warnings if line not in usual]
            if not (same and len(told) == 1 and str(cache / name) in told[0] and files_below(cache) == whole):
                wrong.append(f"{damage.__name__} {name}: {'the same' if same else 'other'} data; {told}")
                for path, content in whole.items():
                    if (cache / path).is_dir():
                        (cache / path).rmdir()
                    (cache / path).parent.mkdir(parents=True, exist_ok=True)
                    (cache / path).write_bytes(content)
            show(f"{damage.__name__} {name}: {told}")
    return len(whole), damages, wrong


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pydocs", action="store_true", help="also the corpus that takes seconds to build")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        runs = configs(place)
        if options.pydocs:
            runs["pydocs"] = replace(CONFIG, data=Data(source="pydocs"))
        for number, (name, config) in enumerate(runs.items()):
            os.environ["HF_HOME"] = str(place / f"home-{number}")
            files, damages, wrong = trial(config, show=print)
            print(f"{name}: {files} files, {damages} damages, {len(wrong)} wrong results", *wrong, sep="\n")


if __name__ == "__main__":
    main()
