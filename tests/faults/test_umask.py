"""The modes of files and folders follow the umask, and several users can share a cache."""

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerBase

from minilm import Config, Data
from minilm.commands.export import export_model
from minilm.commands.recipe import exit_on_error
from minilm.commands.report import write_report
from minilm.commands.seeds import train_seeds
from minilm.data.columnar_files import read_columnar_field_names
from minilm.data.sources import build_columns, load_rows
from minilm.train import train
from minilm.utils.cache import open_entry
from minilm.utils.hub import explain_loading_errors
from tests.faults.damage import configs, content_of
from tests.jobs import config_in, fork
from tests.tiny import tiny_config

pytestmark = pytest.mark.scorecard(40)


def wrong_modes(folder: Path, umask: int) -> list[str]:
    """Return every file and folder below `folder` whose mode is not the one that open and mkdir give."""
    return [
        f"{path.relative_to(folder)} has {stat.S_IMODE(path.stat().st_mode):o}"
        for path in (folder, *folder.rglob("*"))
        if stat.S_IMODE(path.stat().st_mode) != (0o777 if path.is_dir() else 0o666) & ~umask
    ]


def as_child(work: Callable[[], object], place: Path, *, umask: int = 0o022, user: int = 0) -> tuple[int, str]:
    """Return the exit status and the error output of `work` in a forked process that runs as `user`."""

    def begin() -> int:
        os.umask(umask)
        if user:
            os.setgid(user)
            os.setuid(user)
        os.environ["HF_HOME"] = str(place / "hf")
        try:
            exit_on_error(lambda: work() and None)
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    stderr = place / f"stderr-{user}"
    (child,) = fork(begin, stderr, 1)
    status = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
    return status, stderr.read_text()


@pytest.mark.parametrize("umask", [0o002, 0o077], ids=lambda umask: f"{umask:03o}")
def test_all_that_runs_write_follows_the_umask(umask: int, tmp_path: Path) -> None:
    config = config_in(tmp_path, steps=2, save_every=1)
    lora = replace(config.model, name=str(tmp_path / "made" / "seeds" / "seed-0"), type=None, config={}, lora_rank=2)
    made = tmp_path / "made"

    def run(config: Config, name: str, **changes: object) -> Config:
        run = replace(config.run, max_steps=2, save_every=1, keep_last=9, output_dir=str(made / name), **changes)
        return replace(config, run=run)

    def work() -> None:
        made.mkdir()
        train_seeds(run(config, "seeds", trackers=("tensorboard",)), "masked", [0], train)
        train(run(replace(config, model=lora, tokens=replace(config.tokens, vocab_size=16384)), "lora"))
        export_model(made / "lora", made / "exported", "safetensors")
        write_report([str(made / "lora"), str(made / "seeds" / "seed-0")], str(made / "report.html"), png=True)

    status, output = as_child(work, tmp_path, umask=umask)
    assert status == 0, output[-1500:]
    assert len([*made.rglob("model.safetensors")]) == 2 * 3 + 1
    assert wrong_modes(made, umask) == []
    assert wrong_modes(tmp_path / "hf", umask) == []


SECOND = 65_534  # the id of another user, without rights


@pytest.fixture
def shared() -> Iterator[Path]:
    """Yield a folder that all users can enter."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    yield place
    shutil.rmtree(place)


def write(folder: Path) -> None:
    """Fill an entry of the cache."""
    (folder / "below").mkdir()
    (folder / "below" / "file").write_text("whole")


DENIED = r"error: the cache \S+/hf/minilm cannot be written: Permission denied; set HF_HOME to another folder\n"


@pytest.mark.parametrize(
    ("umask", "known", "new", "damaged"),
    [
        (0o000, "", "", ""),
        (0o022, "", DENIED, DENIED),
        (0o077, DENIED, DENIED, DENIED),
    ],
    ids=lambda value: f"{value:03o}" if isinstance(value, int) else "",
)
def test_a_second_user_takes_an_entry_or_gets_an_error(
    umask: int, known: str, new: str, damaged: str, shared: Path
) -> None:
    def error_of_second_user(name: str) -> str:
        def work() -> None:
            assert (open_entry(name, write) / "below" / "file").read_text() == "whole"

        status, output = as_child(work, shared, umask=umask, user=SECOND)
        assert status == (2 if output and "damaged" not in output else 0)
        return output.partition("anew")[2].partition("\n")[2] if "damaged" in output else output

    assert as_child(lambda: open_entry("known", write), shared, umask=umask) == (0, "")
    assert re.fullmatch(known, error_of_second_user("known"))
    assert re.fullmatch(new, error_of_second_user("new"))
    (shared / "hf" / "minilm" / "known" / "below" / "file").write_text("other")
    assert re.fullmatch(damaged, error_of_second_user("known"))


def test_an_entry_that_only_its_owner_can_read_is_named(shared: Path) -> None:
    as_child(lambda: open_entry("known", write), shared, umask=0o022)
    (shared / "hf" / "minilm" / "known" / "below" / "file").chmod(0o600)
    status, output = as_child(lambda: open_entry("known", write), shared, user=SECOND)
    assert status == 2
    assert re.fullmatch(
        rf"error: the cache entry {shared}/hf/minilm/known cannot be read: Permission denied; set HF_HOME to a folder "
        r"of your own, or ask the owner of this one for access\n",
        output,
    )


@pytest.mark.parametrize("name", ["masked LM with words", "causal LM of a stream"])
def test_a_second_user_prepares_the_same_data_from_a_shared_cache(name: str, shared: Path) -> None:
    config = configs(shared)[name]
    config = replace(config, data=replace(config.data, streaming=True))

    def work() -> None:
        (shared / f"content-{os.getuid()}").write_text(repr(content_of(config)))

    shared.chmod(0o777)
    for user in (0, SECOND):
        status, output = as_child(work, shared, user=user)
        assert status == 0, output
    assert (shared / f"content-{SECOND}").read_text() == (shared / "content-0").read_text()


def load(path: Path) -> None:
    with explain_loading_errors(str(path), "model.name"):
        AutoTokenizer.from_pretrained(path)
        AutoModelForMaskedLM.from_pretrained(path)


def read(path: Path) -> None:
    data = Data(source=str(path))
    load_rows(data, str(path), "train", build_columns(data))


@pytest.mark.parametrize(
    ("file", "act", "read_from"),
    [
        ("model/config.json", load, "model"),
        ("model/model.safetensors", load, "model"),
        ("model/tokenizer.json", load, "model"),
        ("model/tokenizer_config.json", load, "model"),
        ("model", load, "model"),
        ("rows.parquet", lambda path: read_columnar_field_names(str(path)), "rows.parquet"),
        ("rows.arrow", lambda path: read_columnar_field_names(str(path)), "rows.arrow"),
        ("rows.parquet", read, "rows.parquet"),
        ("saved/data-00000-of-00001.arrow", read, "saved"),
        ("saved/state.json", read, "saved"),
    ],
)
def test_a_file_that_a_user_may_not_read_is_named_with_the_cause(
    file: str, act: Callable[[Path], object], read_from: str, shared: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    AutoModelForMaskedLM.from_config(tiny_config("bert", tokenizer)).save_pretrained(shared / "model")
    tokenizer.save_pretrained(shared / "model")
    rows = Dataset.from_dict({"text": ["one", "two"]})
    rows.save_to_disk(shared / "saved")
    rows.to_parquet(shared / "rows.parquet")
    shutil.copyfile(shared / "saved" / "data-00000-of-00001.arrow", shared / "rows.arrow")
    shared.chmod(0o777)
    (shared / file).chmod(0)
    status, output = as_child(lambda: act(shared / read_from), shared, user=SECOND)
    assert status == 2
    line = next(line for line in output.splitlines() if line.startswith("error: "))
    assert line.endswith(f"{shared / file}: cannot be read (Permission denied)")
