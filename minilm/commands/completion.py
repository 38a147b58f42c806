"""Scripts with which a shell completes the words of `minilm` and of recipes. This module does not import torch."""

import argparse
import contextlib
import dataclasses
import io
from typing import Annotated, Any

from minilm.config import Config
from minilm.config.command_line import build_type_registry
from minilm.utils.validation import check

# tyro has a flag of this name for the same purpose.
COMPLETION_FLAG = "--tyro-print-completion"
SHELLS = ("bash", "zsh")
# The constants of shtab for the metavars of files and folders.
_FILES = {"FILE": "FILE", "DIR": "DIRECTORY", "OUT": "DIRECTORY"}

# tyro's script completes a recipe only if the recipe is the command. This function finds it after a launcher.
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
    """The action of `--completion`: print the script for a parser with subcommands, and exit."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        try:
            import shtab
        except ImportError:
            parser.error('--completion needs shtab: pip install "shtab>=1.7"')
        for subparsers in parser._actions:
            for command in subparsers.choices.values() if isinstance(subparsers.choices, dict) else ():
                for action in command._actions:
                    if action.metavar in _FILES:
                        action.complete = getattr(shtab, _FILES[action.metavar])
        print(shtab.complete(parser, values))
        parser.exit()


def build_recipe_completion(default: Config, name: str, shell: str) -> str:
    """Return the completion script for the recipe with this file name.

    The script has all flags of a configuration and of `run_recipe`. In bash it also completes the flags of a recipe
    after `accelerate`, `torchrun` and `python`. Raise ValueError for an unknown shell.
    """
    import tyro

    check(shell in SHELLS, f"{COMPLETION_FLAG} must be one of {', '.join(SHELLS)}, not {shell}")
    switch = tyro.conf.FlagCreatePairsOff[bool]
    own: list[tuple[str, Any, Any]] = [
        ("dry_run", Annotated[switch, tyro.conf.arg(help="Describe the run.")], False),
        ("from_run", Annotated[str, tyro.conf.arg(help="Repeat the run of this run.json.")], ""),
        ("seeds", Annotated[tuple[int, ...], tyro.conf.arg(help="Train once per seed.")], ()),
        ("debug", Annotated[switch, tyro.conf.arg(help="Show tracebacks.")], False),
    ]
    fields = [(flag, kind, dataclasses.field(default=value)) for flag, kind, value in own]
    command: Any = dataclasses.make_dataclass("Command", fields, bases=(Config,), frozen=True, kw_only=True)
    plain, script = (tyro.conf.AvoidSubcommands,), io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(script):
        tyro.cli(
            command,
            default=command(**vars(default)),
            args=[COMPLETION_FLAG, shell],
            prog=name,
            config=plain,
            registry=build_type_registry(),
        )
    return script.getvalue() + (_LAUNCHED if shell == "bash" else "")
