"""Scripts by which a shell completes the words of `minilm` and of recipes; like `minilm.config`, without torch."""

import argparse
import contextlib
import dataclasses
import io
from typing import Annotated, Any

from minilm.checks import check
from minilm.config import Config

RECIPE = "--tyro-print-completion"  # tyro's own flag
SHELLS = ("bash", "zsh")
_FILES = {"FILE": "FILE", "DIR": "DIRECTORY", "OUT": "DIRECTORY"}  # what shtab calls that which a metavar stands for

# tyro's script knows a recipe that is a command by itself; this finds the recipe behind the command that launches it.
_LAUNCHED = """
_minilm_launched() {
  local at name
  for ((at = COMP_CWORD - 1; at > 0; at--)); do
    name=${COMP_WORDS[at]##*/}
    name=_tyro_${name//[!a-zA-Z0-9_]/_}
    if [[ ${COMP_WORDS[at]} == *.py ]] && declare -F "$name" > /dev/null; then
      COMP_WORDS=("${COMP_WORDS[@]:at}")
      COMP_CWORD=$((COMP_CWORD - at))
      "$name"
      return
    fi
  done
}
complete -o default -F _minilm_launched accelerate torchrun python python3
"""


class PrintCompletion(argparse.Action):
    """Print the script for a parser with commands, and end."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        try:
            import shtab
        except ImportError:
            parser.error('--completion takes shtab: pip install "shtab>=1.7"')
        for subparsers in parser._actions:
            for command in subparsers.choices.values() if isinstance(subparsers.choices, dict) else ():
                for action in command._actions:
                    if action.metavar in _FILES:
                        action.complete = getattr(shtab, _FILES[action.metavar])
        print(shtab.complete(parser, values))
        parser.exit()


def recipe_completion(default: Config, name: str, shell: str) -> str:
    """The script for the recipe of this file name: all flags of a configuration, and those of `run_recipe` itself.

    In bash it also serves the recipe behind `accelerate`, `torchrun` and `python`. ValueError for an unknown shell.
    """
    import tyro

    check(shell in SHELLS, f"{RECIPE} must be one of {', '.join(SHELLS)}, not {shell}")
    switch = tyro.conf.FlagCreatePairsOff[bool]
    own: list[tuple[str, Any, Any]] = [
        ("dry_run", Annotated[switch, tyro.conf.arg(help="Say what the run would be.")], False),
        ("from_run", Annotated[str, tyro.conf.arg(help="Repeat the run of this run.json.")], ""),
        ("seeds", Annotated[tuple[int, ...], tyro.conf.arg(help="Train once per seed.")], ()),
        ("debug", Annotated[switch, tyro.conf.arg(help="Show tracebacks.")], False),
    ]
    fields = [(flag, kind, dataclasses.field(default=value)) for flag, kind, value in own]
    command: Any = dataclasses.make_dataclass("Command", fields, bases=(Config,), frozen=True, kw_only=True)
    plain, script = (tyro.conf.AvoidSubcommands,), io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(script):
        tyro.cli(command, default=command(**vars(default)), args=[RECIPE, shell], prog=name, config=plain)
    return script.getvalue() + (_LAUNCHED if shell == "bash" else "")
