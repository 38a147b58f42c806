"""The output folder is claimed without harm, and an exported model is whole, plain and equal to the bit."""

import copy
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerBase,
    pipeline,
)

from minilm.config import Config, Run
from minilm.runs.checkpoint import Checkpoint, Progress
from minilm.runs.checkpoint_saver import CheckpointSaver
from minilm.runs.model_export import save_model
from minilm.runs.output_folder import choose_output_dir, claim_output_dir
from minilm.utils.folder_lock import LOCK, unlock_at_end
from tests.checkpoints import logits

LEFTOVERS = (
    ".checkpoint-11.writing",
    ".checkpoint-11.part-2.writing",
    ".probe-ab1_",
    ".checkpoint-1.discarded",
    ".checkpoint-10.replaced",
)


def network(tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> BertForMaskedLM:
    torch.manual_seed(seed)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **size)).eval()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below the folder but its lock; an empty folder counts as a file without content."""
    found = [path for path in folder.rglob("*") if path.name != LOCK]
    paths = [path for path in found if path.is_file() or {*path.iterdir()} <= {path / LOCK}]
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in paths}


@pytest.fixture(autouse=True)
def unlocked() -> Iterator[None]:
    """What a test locks is unlocked after it."""
    with unlock_at_end():
        yield


SMALLEST = {"vocab_size": 8, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4}


def claim(asked: Path | str | None, *, overwrite: bool = False, resume: str | None = None) -> tuple[Path, Checkpoint]:
    run = Run(output_dir=None if asked is None else str(asked), overwrite=overwrite, resume=resume)
    chosen, checkpoint = choose_output_dir(run, "mlm")
    claim_output_dir(chosen, run, BertForMaskedLM(BertConfig(**SMALLEST)))
    return chosen, checkpoint


@pytest.fixture(scope="session")
def earlier(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of an earlier run: checkpoints of the steps 2 and 10."""
    folder = tmp_path_factory.mktemp("earlier")
    model = network(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters())
    saver = CheckpointSaver(folder, model, optimizer, tokenizer, Config(run=Run(save_every=1)), {}, main=True)
    for step in (2, 10):
        saver.save(Progress(step=step, tokens=100 * step))
    saver.wait()
    return folder


@pytest.fixture
def folder(earlier: Path, tmp_path: Path) -> Path:
    """A copy of that folder, with files that a killed checkpoint left and a file of the user's."""
    place = tmp_path / "out" / "mlm"
    shutil.copytree(earlier, place)
    (place / "notes.txt").write_text("mine")
    for name in LEFTOVERS:
        (place / name).mkdir()
        (place / name / "config.json").write_text("half")
    return place


def test_default_folders_are_numbered_and_one_that_is_empty_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("out/mlm-2").mkdir(parents=True)
    for folder in (Path("out/mlm"), Path("out/mlm-2"), Path("out/mlm-3")):
        assert claim(None) == (folder, None)
        assert contents(folder) == {"log.jsonl": b""}


@pytest.mark.parametrize("there", [False, True])
def test_a_named_folder_is_created_with_its_parents_and_an_empty_one_is_used(there, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    if there:
        (tmp_path / "a" / "b").mkdir(parents=True)
    assert claim("~/a/b") == (tmp_path / "a" / "b", None)
    assert contents(tmp_path / "a" / "b") == {"log.jsonl": b""}


@pytest.mark.parametrize("moment", ["before the look", "after the look"])
@pytest.mark.parametrize("asked", [None, "a/b"])
def test_of_two_runs_that_chose_the_same_folder_one_gets_it(asked, moment, earlier, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, model, iterdir = Run(output_dir=asked), BertForMaskedLM(BertConfig(**SMALLEST)), Path.iterdir
    (first, _), (second, _) = (choose_output_dir(run, "mlm") for _ in range(2))

    def claim_first() -> None:
        claim_output_dir(first, run, model)
        shutil.copytree(earlier / "checkpoint-2", first / "checkpoint-2")

    def claimed_after(folder: Path) -> Iterator[Path]:
        found = [*iterdir(folder)]
        monkeypatch.setattr(Path, "iterdir", iterdir)
        claim_first()
        return iter(found)

    second.mkdir(parents=True)
    if moment == "before the look":
        claim_first()
    else:
        monkeypatch.setattr(Path, "iterdir", claimed_after)
    with pytest.raises(ValueError, match=rf"^another run has taken run.output_dir {second} .*: give another [^\n]*$"):
        claim_output_dir(second, run, model)
    assert {Path(name).parts[0] for name in contents(first)} == {"log.jsonl", "checkpoint-2"}


def test_an_overwrite_is_of_the_default_folder_where_none_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = claim(None)[0].name
    (tmp_path / "out" / name / "log.jsonl").touch()
    assert claim(None)[0].name == f"{name}-2"
    assert claim(None, overwrite=True)[0].name == name


def test_a_folder_that_is_not_empty_is_refused_untouched_unless_overwrite_is_set(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty: .* --run\.overwrite.* --run\.resume latest"):
        claim(tmp_path)
    assert claim(tmp_path, overwrite=True) == (tmp_path, None)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize("place", ["file", "file/below", "file/far/below"])
def test_a_folder_that_cannot_be_is_refused_in_one_line(place, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="cannot be written") as caught:
        claim(tmp_path / place, overwrite=True)
    assert str(tmp_path / place) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == {"file": b"mine"}


def test_a_folder_without_room_or_permission_is_refused(tmp_path, monkeypatch):
    def refuse(dir):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ValueError, match="cannot be written: No space left on device"):
        claim(tmp_path)


def test_resume_latest_takes_the_newest_checkpoint_of_the_output_folder(folder, monkeypatch):
    before = contents(folder)
    monkeypatch.chdir(folder.parent.parent)
    for asked, expected in ((folder, folder), (None, Path("out/mlm"))):
        claimed, checkpoint = claim(asked, resume="latest")
        assert claimed == expected
        assert checkpoint.folder == expected / "checkpoint-10"
        assert checkpoint.progress == Progress(step=10, tokens=1000)
    assert contents(folder) == before


def test_resume_latest_without_a_folder_takes_the_newest_checkpoint_of_all_folders(folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    shutil.copytree(folder, "out/mlm-2")
    Path("out/mlm-3").mkdir()
    shutil.copytree(folder, "out/mlm-other")
    for newest in ("mlm-2", "mlm"):
        for path in Path("out", newest).glob("checkpoint-*/manifest.json"):
            path.touch()
        assert claim(None, resume="latest")[0] == Path("out", newest)


def test_a_resume_from_a_path_continues_in_the_folder_that_holds_it(folder, monkeypatch):
    before = contents(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder.parent))
    for path in (str(folder / "checkpoint-2"), "checkpoint-2", "../mlm/checkpoint-2/", "~/mlm/checkpoint-2"):
        for asked in (None, folder):
            claimed, checkpoint = claim(asked, resume=path)
            assert claimed.resolve() == folder
            assert checkpoint.progress == Progress(step=2, tokens=200)
    assert contents(folder) == before


def test_a_checkpoint_that_is_the_working_directory_still_belongs_to_the_folder_above(folder, monkeypatch):
    monkeypatch.chdir(folder / "checkpoint-2")
    claimed, checkpoint = claim(None, resume=".")
    assert (claimed.resolve(), checkpoint.progress.step) == (folder, 2)


@pytest.mark.parametrize("place", ["nothing", "empty", "unfinished"])
def test_latest_without_a_complete_checkpoint_is_refused_and_creates_nothing(place, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("checkpoint-3", ".checkpoint-5.writing"):
        (tmp_path / "unfinished" / name).mkdir(parents=True)
        (tmp_path / "unfinished" / name / "config.json").write_text("half")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="no complete checkpoint") as caught:
        claim(tmp_path / place, resume="latest")
    assert str(tmp_path / place) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["checkpoint-7", "notes.txt", ".checkpoint-11.writing"])
def test_a_path_that_is_not_a_checkpoint_is_refused_untouched(name, folder):
    before = contents(folder)
    with pytest.raises(ValueError, match="not a usable checkpoint") as caught:
        claim(None, resume=str(folder / name))
    assert str(folder / name) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(folder) == before


def test_a_branch_into_a_folder_that_is_not_empty_is_refused_untouched(folder, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(
        ValueError, match=r"run\.output_dir .* is not empty, and .* is a checkpoint of another"
    ) as caught:
        claim(tmp_path / "other", resume=str(folder / "checkpoint-2"))
    assert str(tmp_path / "other") in str(caught.value)
    assert contents(tmp_path) == before


def test_a_refused_folder_of_an_earlier_run_is_untouched(folder):
    before = contents(folder)
    with pytest.raises(ValueError, match="is not empty"):
        claim(folder)
    assert contents(folder) == before


def test_overwriting_removes_the_checkpoints_of_the_earlier_run_and_no_other_file(folder):
    for name in ("checkpoint-best", "checkpoints", "checkpoint-500"):  # folders of the user's
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_text("mine")
    (folder / "checkpoint-3").write_text("a file of the user's")
    (folder / ".checkpoint-list").write_text("a file of the user's")
    removed = {"checkpoint-2", "checkpoint-10", *LEFTOVERS}
    kept = {name: data for name, data in contents(folder).items() if Path(name).parts[0] not in removed}
    assert claim(folder, overwrite=True) == (folder, None)
    assert contents(folder) == kept
    assert set(kept) == {
        "notes.txt",
        "checkpoint-best/model.safetensors",
        "checkpoints/model.safetensors",
        "checkpoint-500/model.safetensors",
        "checkpoint-3",
        ".checkpoint-list",
    }


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
@pytest.mark.parametrize("asked", [{"overwrite": True}, {"resume": "latest"}])
def test_what_is_not_of_minilm_and_in_the_way_of_a_checkpoint_is_refused_untouched(asked, kind, folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "trainer_state.json").write_text("mine")
    place, model = folder / "checkpoint-500", BertForMaskedLM(BertConfig(**SMALLEST))
    if kind == "folder":
        shutil.copytree(tmp_path / "elsewhere", place)
    elif kind == "file":
        place.write_text("mine")
    else:
        place.symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"^run.output_dir .* holds checkpoint-500, which minilm did not write[^\n]*$"):
        claim_output_dir(folder, Run(**asked), model, steps=500)
    assert contents(tmp_path) == before
    claim_output_dir(folder, Run(**asked), model, steps=499)
    claim_output_dir(folder, Run(**asked, save_every=0), model, steps=500)
    after = contents(tmp_path)
    assert {name: after.get(name) for name in before if "500" in name or "elsewhere" in name}.items() <= before.items()


def test_overwriting_a_folder_with_a_link_in_place_of_a_checkpoint_is_refused_untouched(folder, tmp_path):
    (folder / "checkpoint-2").rename(tmp_path / "elsewhere")
    (folder / "checkpoint-2").symlink_to(tmp_path / "elsewhere")
    for name in LEFTOVERS:
        shutil.rmtree(folder / name)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="cannot be written: checkpoint-2 is a symbolic link"):
        claim(folder, overwrite=True)
    assert contents(tmp_path) == before


def test_a_checkpoint_that_is_half_removed_by_an_overwrite_is_removed_by_the_next(folder, monkeypatch):
    rmtree = shutil.rmtree

    def fail(path: Path, ignore_errors: bool = False) -> None:
        if (path / "manifest.json").exists():
            (path / "manifest.json").unlink()
            (path / "training.json").unlink()
            raise OSError(5, "Input/output error")
        rmtree(path, ignore_errors=ignore_errors)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        with pytest.raises(ValueError, match="cannot be written: Input/output error"):
            claim(folder, overwrite=True)
    claim(folder, overwrite=True)
    assert set(contents(folder)) == {"notes.txt"}


def test_overwriting_a_folder_that_cannot_be_written_removes_nothing(folder, monkeypatch):
    def refuse(dir):
        raise OSError(30, "Read-only file system")

    before = contents(folder)
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ValueError, match="cannot be written: Read-only file system"):
        claim(folder, overwrite=True)
    assert contents(folder) == before


@pytest.mark.parametrize("asked", [None, "a/b"])
def test_choosing_a_folder_creates_nothing_and_changes_nothing(asked, folder, monkeypatch):
    monkeypatch.chdir(folder)
    before = contents(folder)
    assert choose_output_dir(Run(output_dir=asked), "mlm") == (Path(asked or "out/mlm"), None)
    assert choose_output_dir(Run(output_dir=str(folder), overwrite=True), "mlm") == (folder, None)
    assert contents(folder) == before


@pytest.mark.parametrize(("save_every", "times"), [(1, 4), (0, 1)])
def test_a_disk_without_room_for_the_run_is_refused_and_nothing_changes(
    save_every, times, tokenizer, folder, monkeypatch
):
    model, run = network(tokenizer), Run(output_dir=str(folder), overwrite=True, save_every=save_every)
    needed = times * sum(parameter.nbytes for parameter in model.parameters())
    before = contents(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed - 1))
    for place in (folder, folder / "new"):
        with pytest.raises(ValueError, match=rf"^run.output_dir {place} has .* MB free .* needs [^\n]*$"):
            claim_output_dir(place, run, model)
    assert contents(folder) == before
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed))
    claim_output_dir(folder / "new", run, model)
    assert (folder / "new").is_dir()


@pytest.mark.scorecard(28)
def test_an_exported_model_loads_plainly_with_the_same_logits_bit_for_bit(tokenizer, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    model = network(tokenizer)
    expected = logits(model)
    save_model(model, tokenizer, tmp_path)
    assert torch.equal(logits(AutoModelForMaskedLM.from_pretrained(tmp_path)), expected)
    assert AutoTokenizer.from_pretrained(tmp_path)("A short one.") == tokenizer("A short one.")
    assert len(pipeline("fill-mask", model=str(tmp_path))("The [MASK] fox.")) == 5
    needed = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "notes.txt"}
    assert set(contents(tmp_path)) == needed
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir() if path.name != "notes.txt"} == {0o644}


@pytest.mark.parametrize("template", ["one", {"default": "one", "tool_use": "two"}, {"rag": "three"}, None], ids=str)
def test_every_chat_template_is_exported_and_none_of_an_earlier_model(template, tokenizer, tmp_path):
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = {"default": "oldest", "rag": "oldest"}
    chatting.save_pretrained(tmp_path)  # as transformers does it: in a folder
    for chatting.chat_template in ("old", {"default": "older", "rag": "old"}, template):
        save_model(network(tokenizer), chatting, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == template


def test_an_export_takes_the_place_of_an_older_one(tokenizer, tmp_path):
    for seed in (0, 1):
        save_model(network(tokenizer, seed), tokenizer, tmp_path)
    assert torch.equal(logits(AutoModelForMaskedLM.from_pretrained(tmp_path)), logits(network(tokenizer, 1)))


@pytest.mark.parametrize("fails", ["model", "tokenizer", "sync"])
def test_an_old_model_survives_a_failed_export(fails, tokenizer, tmp_path, monkeypatch):
    save_model(network(tokenizer), tokenizer, tmp_path)
    before = contents(tmp_path)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def write_half(self, folder, **kwargs):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        fail()

    target, name = {
        "model": (BertForMaskedLM, "save_pretrained"),
        "tokenizer": (type(tokenizer), "save_pretrained"),
        "sync": (os, "fsync"),
    }[fails]
    monkeypatch.setattr(target, name, write_half if fails == "model" else fail)
    with pytest.raises(OSError, match="No space left"):
        save_model(network(tokenizer, seed=1), tokenizer, tmp_path)
    assert contents(tmp_path) == before


def test_the_weights_are_renamed_last(tokenizer, tmp_path, monkeypatch):
    replace, renamed = os.replace, []

    def record(source, target):
        renamed.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", record)
    save_model(network(tokenizer), tokenizer, tmp_path)
    assert renamed[-1] == "model.safetensors"
    assert sorted(renamed) == sorted(contents(tmp_path))
