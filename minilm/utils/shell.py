"""Command lines that a user can paste into a shell."""

import shlex
from pathlib import Path


def format_command(command: str, folder: Path, *words: str) -> str:
    """Return the shell line `minilm COMMAND FOLDER WORDS`, with quotes where the shell needs them."""
    name = str(folder)
    return shlex.join(["minilm", command, f"./{name}" if name.startswith("-") else name, *words])
