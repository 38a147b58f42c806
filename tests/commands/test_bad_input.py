"""A user's mistake is reported once, in one line, before the first step, and no file changes."""

import subprocess
import sys

import pytest

from tests.bad_input import ENTRIES
from tests.forks import CANARY, LIMIT, Outcome, outcomes, wrong
from tests.jobs import write_text
from tests.launch import ROOT, launch


@pytest.fixture(scope="module")
def told() -> dict[str, Outcome]:
    return outcomes("tests.bad_input", ENTRIES)


@pytest.mark.scorecard(30)
@pytest.mark.parametrize("name", ENTRIES)
def test_a_mistake_is_reported_in_one_line_and_changes_no_file(name, told):
    assert wrong(ENTRIES[name], told[name]) == "", "\n".join(told[name].error)


@pytest.mark.scorecard(30)
def test_all_mistakes_are_reported_as_they_should_be(told, figure):
    right = [name for name, entry in ENTRIES.items() if not wrong(entry, told[name])]
    slowest = max(outcome.seconds for outcome in told.values())
    figure(
        f"{len(right)} of {len(ENTRIES)} refused in one line, files untouched, "
        f"the slowest {slowest:.1f} s after the imports"
    )
    assert len(right) == len(ENTRIES)


@pytest.mark.parametrize(
    ("flaw", "change"),
    [
        ("status", {"status": 1}),
        ("lines", {"error": ["error: no such file", "error: no such file"]}),
        ("lines", {"error": ["Traceback (most recent call last):", "error: no such file"]}),
        ("lines", {"error": []}),
        ("says", {"error": ["error: something else"]}),
        ("changed", {"changed": ["out"]}),
        ("token", {"error": [f"error: no such file {CANARY}"]}),
    ],
)
def test_an_outcome_that_is_not_as_it_should_be_is_seen(flaw, change):
    entry = ENTRIES["missing file"]
    right = {"status": 2, "error": ["error: doc.txt: no such file"], "changed": [], "seconds": 0.1}
    assert wrong(entry, Outcome(**right)) == ""
    assert flaw in wrong(entry, Outcome(**{**right, **change}))


@pytest.mark.scorecard(30)
def test_two_processes_of_a_launcher_tell_it_once(tmp_path, figure):
    write_text(tmp_path / "text.txt")
    flags = ("--batch.examples", "1", "--data.source", tmp_path / "text.txt", "--run.output-dir", tmp_path / "out")
    done = launch("mlm_pydocs.py", *map(str, flags), processes=2)
    assert done.returncode != 0
    says = "batch.examples=1 is less than the 2 processes"
    assert sum(says in line for line in (done.stdout + done.stderr).splitlines()) == 1, done.stderr
    assert done.stderr.count("error: ") == 1
    assert not (tmp_path / "out").exists()
    figure("one line from 2 processes together")


@pytest.mark.scorecard(30)
def test_a_mistake_ends_a_recipe_in_time_with_one_line_and_status_2(tmp_path):
    command = [sys.executable, str(ROOT / "recipes" / "mlm_pydocs.py"), "--data.source", "docs.txt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=6 * LIMIT, check=False)
    told = [line for line in done.stderr.splitlines() if not line.endswith(" …")]
    assert (done.returncode, told) == (2, ["error: data source docs.txt: no such file or folder"])
    assert [*tmp_path.iterdir()] == []
