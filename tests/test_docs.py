"""What the documentation says to type works: each page's blocks are run, in their order, in an empty folder.

A block of `python` whose first line is `# NAME.py` is written to that file, any other is run. The lines of a block of
`bash` are run: recipes and `minilm` in a fork of this process, which saves the seconds of importing torch, all else by
bash. A `sed -i` must change its file. Each line of the `text` after a block that ran is one of its output, but for
numbers and for what `…` stands for.
A block after `<!-- not run: REASON -->` is not run, and its output is taken on trust.
"""

import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from comparison import build_parts

import minilm
from minilm import Batch, Config, Data, Model, Run, Tokens
from minilm.commands.main import main
from minilm.config.objective_class import find_builtin_classes
from minilm.runs import resume, step_changes
from tests.jobs import fork
from tests.launch import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>.*?) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
LIMIT = 240  # seconds of a command


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of a page."""

    kind: str
    text: str
    reason: str | None
    """Why it is not run."""


def blocks(page: Path) -> list[Block]:
    """In their order."""
    return [Block(**found.groupdict()) for found in FENCE.finditer(page.read_text(encoding="utf-8"))]


def forked(work: Callable[[], object], place: Path) -> str:
    """What `work` prints in a fork of this process, in the folder `place`; AssertionError where it fails."""

    def status() -> int:
        os.dup2(2, 1)  # both to the file
        os.chdir(place)
        sys.path.insert(0, str(place))
        try:
            work()
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            sys.stdout.flush()
        return 0

    output = place.with_name(f"{place.name}-output")
    (child,) = fork(status, output, 1)
    try:
        code = child.wait(LIMIT)
    finally:
        if child.is_running():
            child.kill()
    text = output.read_text(encoding="utf-8", errors="replace")
    assert code == 0, text[-3000:]
    return text


def run_file(words: list[str]) -> None:
    """`python FILE FLAGS…` in this very process."""
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def command(line: str, place: Path) -> str:
    """What a line of bash prints, run in the folder `place`."""
    words = shlex.split(line, comments=True)
    if words[:1] == ["minilm"]:
        return forked(lambda: main(words[1:]), place)
    if words[:1] == ["python"] and words[1].endswith(".py"):
        return forked(lambda: run_file(words[1:]), place)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # A pattern that no longer occurs in the file makes sed do nothing, without an error.
    edited = place / words[-1] if words[:2] == ["sed", "-i"] else None
    before = edited.read_bytes() if edited is not None else b""
    done = subprocess.run(
        ["bash", "-c", line], cwd=place, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert edited is None or edited.read_bytes() != before, f"{line} changes nothing in {edited}"
    return done.stdout + done.stderr


def run(block: Block, place: Path) -> str:
    """What the block prints."""
    if block.kind == "python":
        named = re.match(r"# (\w+\.py)\n", block.text)
        (place / (named[1] if named else "block.py")).write_text(block.text, encoding="utf-8")
        return "" if named else forked(lambda: run_file(["block.py"]), place)
    lines = block.text.replace("\\\n", " ").splitlines()
    return "".join(command(line, place) for line in lines if line.strip())


def shown(line: str, output: str) -> bool:
    """Whether a page's line is one of the output, whatever its numbers are, and whatever is in place of `…`."""
    pattern = re.sub(r"\d(?:\d|,|\\\.)*", r"[\\d.,]+", re.escape(line.strip()).replace("…", ".*"))
    return re.search(rf"^\s*{pattern}\s*$", output.replace("\r", "\n"), re.MULTILINE) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_page_word_by_word(page: Path, tmp_path: Path) -> None:
    place, output = tmp_path / "empty", ""
    place.mkdir()
    for block in blocks(page):
        assert block.kind in ("python", "bash", "text"), f"say what kind of block begins with {block.text[:40]!r}"
        if block.kind == "text":
            missing = [
                line for line in block.text.splitlines() if output and line.strip(" …") and not shown(line, output)
            ]
            assert not missing, f"{missing} not in {output[-3000:]}"
        else:
            output = run(block, place) if block.reason is None else ""


def test_what_is_not_run_says_why_and_is_bash_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    marked = [(page.name, block) for page in PAGES for block in blocks(page) if block.reason is not None]
    assert len(marked) == sum(page.read_text(encoding="utf-8").count("<!--") for page in PAGES)
    for name, block in marked:
        with capsys.disabled():
            print(f"\n{name}: not run: {block.reason}", end="")
        assert block.reason
        assert block.kind == "bash"
        subprocess.run(["bash", "-n", "-c", block.text], check=True)


def test_flags_and_recipes_that_are_named_exist() -> None:
    kinds: list[tuple[str, Any]] = [(group.name, type(getattr(Config(), group.name))) for group in fields(Config)]
    kinds += [("objective", kind) for kind in find_builtin_classes().values()]
    known = {f"{group}.{field.name.replace('_', '-')}" for group, kind in kinds for field in fields(kind)}
    known |= {f"{group}.no-{field.name}" for group, kind in kinds for field in fields(kind) if field.type is bool}
    for page in (*PAGES, ROOT / "README.md"):
        text = page.read_text(encoding="utf-8")
        groups = "|".join(field.name for field in fields(Config))
        flags = set(re.findall(rf"--((?:{groups})\.[a-z][a-z-]*)", text))
        # A page may define an objective of its own, whose fields are flags.
        own = {f"objective.{name.replace('_', '-')}" for name in re.findall(r"\b(\w+): (?:float|int|str|bool) =", text)}
        assert flags - known - own == set(), page.name
        paths = re.findall(r"(?<![\w/])(?:recipes|benchmarks|tests|minilm)/[\w/]+\.\w+", text)
        assert [path for path in paths if path != "recipes/X.py" and not (ROOT / path).exists()] == [], page.name
        links = re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text)
        assert [link for link, _ in links if not (page.parent / link).exists()] == [], page.name
        anchors = [(page.parent / link if link else page, anchor) for link, anchor in links if anchor]
        assert [anchor for target, anchor in anchors if anchor not in headings(target)] == [], page.name


def headings(page: Path) -> set[str]:
    """The anchors of the page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_the_page_on_resuming_has_each_setting_that_may_change() -> None:
    page = (ROOT / "docs" / "resuming.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .*--.*$", page, re.MULTILINE)
    listed = {flag.replace("-", "_") for row in rows for flag in re.findall(r"--([a-z]+\.[a-z-]+)", row)}
    # The page describes the sources, the folder of the run and the schedules in words.
    in_words = {*resume._UNREPORTED, *resume._SOURCES, "objective.defined_in"}
    assert listed == {*resume._MAY_CHANGE, *step_changes._LENGTH} - in_words


def test_the_loop_in_the_readme(tmp_path: Path) -> None:
    (loop,) = [block.text for block in blocks(ROOT / "README.md") if "train_step(" in block.text]
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"Line {i} of a text." for i in range(40)), encoding="utf-8")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    parts = build_parts(
        Config(
            data=Data(source=str(path)),
            tokens=Tokens(vocab_size=300),
            model=Model(type="bert", config=size),
            batch=Batch(examples=8, max_length=16),
            run=Run(precision="fp32"),
        )
    )
    names: dict[str, Any] = {
        "examples": parts.prepared.train,
        "seed": 0,
        "total": 3,
        "workers": 0,
    }
    names |= {
        name: getattr(parts, name) for name in ("config", "accelerator", "model", "optimizer", "plan", "collator")
    }
    try:
        exec("from minilm.optim.schedule import learning_rate\nfrom minilm.train import *\n" + loop, names)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert names["step"] == 2
    assert float(names["result"].loss) > 0


def test_the_example_of_the_api_in_the_readme(tmp_path: Path) -> None:
    (example,) = [block.text for block in blocks(ROOT / "README.md") if "result = train(" in block.text]
    assert example.count("epochs=2") == 1
    (tmp_path / "my_text.txt").write_text("\n".join(f"Line {i} of a text." for i in range(40)), encoding="utf-8")
    (tmp_path / "example.py").write_text(
        example.replace("epochs=2", "max_steps=2") + 'print(result.figures["steps"])\n'
    )
    assert re.search(r"^2(\.0)?$", forked(lambda: run_file(["example.py"]), tmp_path), re.MULTILINE)
    assert (tmp_path / "out" / "python" / "model.safetensors").exists()


def test_the_readme_is_read_in_a_few_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1200


def test_the_example_that_help_shows(tmp_path: Path) -> None:
    parts = [part for part in (minilm.__doc__ or "").split("\n\n") if part.startswith("    ")]
    example = textwrap.dedent("\n".join(parts[:2]))  # imports, and what is done with them
    (tmp_path / "my_text.txt").write_text("\n".join(f"Line {i} of a text." for i in range(40)), encoding="utf-8")
    (tmp_path / "example.py").write_text(example, encoding="utf-8")
    assert len(example.strip().splitlines()) <= 6
    assert re.search(r"^\d\.\d+ \d+\.\d+$", forked(lambda: run_file(["example.py"]), tmp_path), re.MULTILINE)


@pytest.mark.parametrize("name", minilm.__all__)
def test_help_says_what_a_name_is_and_what_it_takes(name: str) -> None:
    kind = getattr(minilm, name)
    assert len(kind.__doc__.split()) >= 5
    assert not kind.__doc__.startswith(f"{name}(")  # what dataclasses makes up
    if name == "Config":  # its fields are of the kinds that the others are
        return
    explained = dict(line.split(": ", 1) for line in kind.__init__.__doc__.splitlines())
    assert [*explained] == [field.name for field in fields(kind)]
    assert all(len(text.split()) > 1 for text in explained.values())


def test_the_modules_that_help_names_have_what_it_says() -> None:
    listed = re.findall(r"^    (minilm\.[\w.]+) +(.*)$", minilm.__doc__ or "", re.MULTILINE)
    assert len(listed) > 10
    for name, text in listed:
        module = importlib.import_module(name)
        words = re.findall(r"\b[A-Z]\w*[a-z]\w*|\w+_\w+", text)
        assert [word for word in words if not hasattr(module, word)] == [], name


def test_a_page_of_the_api_for_each_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pdoc = pytest.importorskip("pdoc", reason="pip install -e '.[docs]'")
    patterns = ("minilm/[a-z]*.py", "minilm/[a-z]*/")
    for page in (ROOT / "docs" / "README.md", ROOT / "CONTRIBUTING.md"):
        assert " ".join(["pdoc minilm", *patterns, "-o docs/api"]) in page.read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "path", [*sys.path])  # pdoc adds to it
    paths = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "minilm").rglob("*.py")
        # The page of `minilm.config` has all of its public names.
        if path.parent.name != "config" or path.name == "__init__.py"
    }
    assert set(pdoc.extract.walk_specs(["minilm", *paths])) == modules
    # Pages of all modules would take a quarter of a minute, so this test writes a few.
    pdoc.render.configure(show_source=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc.pdoc("minilm", *ROOT.glob(patterns[0]), output_directory=tmp_path)
    assert (tmp_path / "minilm" / "train.html").exists()
    assert "Examples in an optimizer step, over all processes" in (tmp_path / "minilm.html").read_text(encoding="utf-8")
