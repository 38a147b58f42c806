"""When the reader of the output goes away, a run continues, and a command ends silently."""

import ast
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from minilm.commands.main import main
from minilm.utils.shell import format_command
from tests.jobs import write_text
from tests.launch import ROOT

RUN = """
from dataclasses import replace
from pathlib import Path
from minilm.commands.recipe import run_recipe
from tests.jobs import config_in
config = config_in(Path({place!r}), 40, save_every=20)
run_recipe(replace(config, run=replace(config.run, output_dir={out!r})))
"""
COMMAND = """
import time
from minilm.commands.recipe import exit_on_error
def work():
    time.sleep(1)
    for number in range({lines}):
        print(number)
exit_on_error(work)
"""


def without_readers(script: str, arguments: str = "") -> tuple[int, str]:
    """Run a program whose readers go away after the first line. Return its exit status and bash's error output."""
    line = f"{{ {sys.executable} -c {shlex.quote(script)} {arguments}; echo $? >&3; }}"
    done = subprocess.run(
        ["bash", "-c", f"exec 3>&1; {line} 2>&1 | head -n 1 >/dev/null"], cwd=ROOT, capture_output=True, text=True
    )
    return int(done.stdout), done.stderr


def test_a_run_continues_to_its_end_when_its_readers_go_away(tmp_path: Path) -> None:
    write_text(tmp_path / "text.txt")
    script = RUN.format(place=str(tmp_path), out=str(tmp_path / "out"))
    assert without_readers(script, "--optim.lr 0.01") == (0, "")
    assert (tmp_path / "out" / "all_results.json").is_file()
    assert (tmp_path / "out" / "checkpoint-40").is_dir()


@pytest.mark.parametrize("lines", [3, 100_000])
def test_a_command_ends_silently_when_the_reader_of_stdout_goes_away(lines: int) -> None:
    script = f"{sys.executable} -c {shlex.quote(COMMAND.format(lines=lines))}"
    done = subprocess.run(
        ["bash", "-c", f"{script} | true; echo ${{PIPESTATUS[0]}}"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("141\n", "")


@pytest.mark.parametrize("name", ["out/plain", "my models/one", "it's", '"quoted"', "$HOME `id`", "-dash", "a\nb", "*"])
@pytest.mark.parametrize("text", ["… [MASK] …", "… <mask> …", "… $MASK 'x' …"])
def test_the_shell_reads_the_line_that_tries_a_model_as_it_is_meant(
    name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    show = f"{shlex.quote(sys.executable)} -c 'import sys; print(ascii(sys.argv[1:]))'"
    line = format_command("fill-mask", Path(name), text)
    read = subprocess.run(
        ["bash", "-c", f'minilm() {{ {show} "$@"; }}; {line}'], capture_output=True, text=True, check=True
    )
    words = ast.literal_eval(read.stdout)
    seen = []
    monkeypatch.setattr(
        "minilm.commands.model_commands.run_fill_mask", lambda options: seen.append((options.model, options.texts))
    )
    main(words)
    assert [(str(Path(model)), texts) for model, texts in seen] == [(name, [text])]
