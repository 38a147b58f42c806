"""The history of an output folder: each start and each end of the run, with the command and the reason.

`history.jsonl` has a line for each event, with `event`, `time` (UTC) and

- `start`: `step`, the steps done before; `command`, the command line; for a run of a recipe also `changed`, which
  has the value of the recipe and of the run for each setting that is not the recipe's.
- `end`: `status`, which is `finished`, `stopped` or `failed`, and `reason`, a line. A killed process writes no end.

A run that is resumed begins again at a checkpoint, so the steps of its events need not rise.
"""

import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from minilm.config import Config
from minilm.config.serialization import to_dict
from minilm.utils.atomic_files import write_atomically
from minilm.utils.errors import TrainingStopped

HISTORY = "history.jsonl"
# The settings of the recipe of this process, before the flags.
_recipe: ContextVar[Config | None] = ContextVar("recipe", default=None)


@contextmanager
def runs_of_recipe(config: Config) -> Iterator[None]:
    """Let the histories of the runs in the block name the settings in which they differ from a recipe's `config`."""
    token = _recipe.set(config)
    try:
        yield
    finally:
        _recipe.reset(token)


class RunHistory:
    """Writes the start and the end of one run. It writes no end without a start."""

    def __init__(self) -> None:
        self._folder: Path | None = None

    def start(self, folder: Path, step: int, settings: Mapping[str, Any]) -> None:
        """Write that the run begins after `step` steps. A new run drops the history of an earlier one in the folder.

        settings: the configuration, in the form of `minilm.config.serialization.to_dict`.
        """
        if step == 0:
            (folder / HISTORY).unlink(missing_ok=True)
        self._folder = folder
        recipe = _recipe.get()
        changed = {} if recipe is None else {"changed": _find_changes(to_dict(recipe), settings)}
        self._add({"event": "start", "time": _now(), "step": step, "command": _command(), **changed})

    def end(self, error: BaseException | None = None) -> None:
        """Write that the run ends, because of `error` if there is one."""
        if self._folder is None:
            return
        # The status of the process that a signal stops is above 128. That after bad gradients is 1.
        signalled = isinstance(error, TrainingStopped) and error.status > 128
        stopped = signalled or isinstance(error, KeyboardInterrupt)
        status = "finished" if error is None else "stopped" if stopped else "failed"
        # The error itself is more important than a history that cannot be written.
        with suppress(OSError):
            self._add({"event": "end", "time": _now(), "status": status, "reason": _describe(error)})
        self._folder = None

    def _add(self, event: dict[str, Any]) -> None:
        assert self._folder is not None
        path = self._folder / HISTORY
        earlier = path.read_bytes() if path.is_file() else b""
        # A damaged last line must not take the new one with it.
        end = b"\n" if earlier and not earlier.endswith(b"\n") else b""
        write_atomically(path, earlier + end + json.dumps(event).encode() + b"\n")


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Return the events in the history of an output folder; none for a run of an earlier version."""
    try:
        lines = (folder / HISTORY).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    events = []
    for line in lines:
        with suppress(ValueError, RecursionError):
            event = json.loads(line)
            if isinstance(event, dict) and event.get("event") in ("start", "end"):
                events.append(event)
    return events


def flatten_tree(tree: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """Return the leaves of nested dictionaries by their names, joined by the separator."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= {f"{name}{separator}{key}": part for key, part in flatten_tree(value, separator).items()}
        else:
            flat[name] = value
    return flat


def _find_changes(recipe: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the value of the recipe and of the run for each setting that differs."""
    before, after = flatten_tree(recipe), flatten_tree(settings)
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return {name: [before.get(name), after.get(name)] for name in names}


def _command() -> str:
    """Return the command line of this process, without the launcher."""
    first = ("python",) if sys.argv[0].endswith(".py") else ()
    return shlex.join((*first, *sys.argv))


def _describe(error: BaseException | None) -> str:
    """Return one line about an error."""
    if error is None:
        return ""
    text = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, TrainingStopped | ValueError):
        return text[:500]
    return f"{type(error).__name__}: {text}"[:500]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
