"""What shells are given to complete words by: bash takes it, and it knows the flags, those of run_recipe too."""

import subprocess
import sys
from pathlib import Path

import pytest

from minilm import CausalLM, Config
from minilm.commands.main import main
from minilm.commands.recipe import run_recipe


def bash(script: str) -> str:
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script for a recipe."""
    path = tmp_path_factory.mktemp("scripts") / "recipe.bash"
    program = """
import sys
from minilm import CausalLM, Config
from minilm.commands.recipe import run_recipe
sys.argv = ["recipes/mine-1.py", "--tyro-print-completion", "bash"]
run_recipe(Config(objective=CausalLM()), "words", print)
assert "torch" not in sys.modules
"""
    with path.open("w") as file:
        subprocess.run([sys.executable, "-c", program], stdout=file, check=True)
    return path


def test_bash_takes_a_recipes_script(recipe: Path) -> None:
    subprocess.run(["bash", "-n", recipe], check=True)


@pytest.mark.parametrize("launcher", ["accelerate launch --num_processes 2", "python", "torchrun"])
@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("--se", {"--seeds"}),
        ("--dr", {"--dry-run"}),
        ("--from-run a --run.see", {"--run.seed"}),
        ("--run.precision b", {"bf16"}),
        (
            "--objective.",
            {
                "--objective.label-smoothing",
                "--objective.teacher",
                "--objective.teacher-temperature",
                "--objective.teacher-weight",
                "--objective.z-loss",
            },
        ),
    ],
)
def test_bash_completes_the_flags_of_a_recipe_behind_its_launcher(
    launcher: str, typed: str, expected: set[str], recipe: Path
) -> None:
    words = f"{launcher} some/where/mine-1.py {typed}".split()
    given = " ".join(f"'{word}'" for word in words)
    found = bash(
        f"source {recipe}; COMP_WORDS=({given}) COMP_CWORD={len(words) - 1}; _minilm_launched; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    assert set(found.split()) == expected


def test_behind_a_launcher_of_something_else_nothing_is_completed(recipe: Path) -> None:
    script = "COMP_WORDS=(python other.py --se) COMP_CWORD=2; _minilm_launched; echo ${#COMPREPLY[@]}"
    assert bash(f"source {recipe}; {script}").strip() == "0"


def test_the_commands_script_is_bash_and_knows_commands_and_flags(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--completion", "bash"])
    script = capsys.readouterr().out
    assert end.value.code == 0
    path = tmp_path / "minilm.bash"
    path.write_text(script)
    subprocess.run(["bash", "-n", path], check=True)
    for word in ("fill-mask", "doctor", "--max-new-tokens", "--top-p", "--png"):
        assert word in script
    assert "-F _shtab_minilm minilm" in script


@pytest.mark.parametrize("words", [["--tyro-print-completion"], ["--tyro-print-completion", "fish"]])
def test_an_unknown_shell_is_refused_in_one_line(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minilm.commands.recipe.interrupt_on_signals", lambda: lambda work: work)
    monkeypatch.setattr(sys, "argv", ["recipes/mine.py", *words])
    with pytest.raises(SystemExit) as end:
        run_recipe(Config(objective=CausalLM()), "", pytest.fail)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "must be one of bash, zsh" in line


def test_without_shtab_the_error_names_the_package(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as end:
        main(["--completion", "zsh"])
    assert end.value.code == 2
    assert 'pip install "shtab' in capsys.readouterr().err.splitlines()[-1]
