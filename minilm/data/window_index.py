"""The index of a stream's windows: where each of them begins, as far as they have been encoded.

It is a file of the cache with a line for each window, and a hash in each line of this and all earlier lines. A
checkpoint holds the index too, so that a run resumes at its window on a machine that has encoded none.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilm.data.shards import START
from minilm.data.tables import Place
from minilm.utils.atomic_files import remove_path, write_atomically
from minilm.utils.cache import explain_cache_errors, get_cache_folder


@dataclass(frozen=True)
class PoolPlace:
    """A place in a pool."""

    passes: int = 0
    """The number of passes over all shards before."""
    shard: int = 0
    """The position of the shard in the order of this pass."""
    place: Place = START


@dataclass(frozen=True, kw_only=True)
class WindowStart:
    """Where a window begins."""

    number: int
    """The number of the window, from 0."""
    step: int
    """The step of the run that is the window's first."""
    pools: tuple[PoolPlace, ...]

    def to_json(self) -> dict[str, Any]:
        places = [[pool.passes, pool.shard, *pool.place] for pool in self.pools]
        return {"number": self.number, "step": self.step, "pools": places}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "WindowStart":
        pools = [PoolPlace(passes, shard, (row, byte)) for passes, shard, row, byte in fields["pools"]]
        return cls(number=fields["number"], step=fields["step"], pools=tuple(pools))


@dataclass(frozen=True)
class WindowIndex:
    """The index of the stream whose windows have this key (`minilm.data.stream_windows.StreamWindows.key`)."""

    key: str

    @property
    def path(self) -> Path:
        return get_cache_folder() / f"windows-{self.key}.jsonl"

    def read(self) -> list[WindowStart]:
        """Return the starts of the windows after the first, up to the first line that is damaged."""
        try:
            return self._parse(self.path.read_text("utf-8").splitlines())
        except (OSError, ValueError):
            return []

    def write(self, starts: Iterable[WindowStart]) -> None:
        """Replace the index by these starts, those of the windows after the first."""
        if self.path.is_dir():
            remove_path(self.path)
        with explain_cache_errors(self.path.parent):
            write_atomically(self.path, "".join(f"{line}\n" for line in self._format(starts)))

    def export(self, starts: Iterable[WindowStart]) -> dict[str, Any]:
        """Return an index of these starts as JSON types, for `restore_index`."""
        return {"key": self.key, "lines": self._format(starts)}

    def _format(self, starts: Iterable[WindowStart]) -> list[str]:
        digest, lines = self.key, list[str]()
        for start in starts:
            digest = _chain(digest, start)
            lines.append(json.dumps({**start.to_json(), "hash": digest}))
        return lines

    def _parse(self, lines: Iterable[str]) -> list[WindowStart]:
        starts, digest = list[WindowStart](), self.key
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            for line in lines:
                fields = json.loads(line)
                stored_digest, start = fields.pop("hash"), WindowStart.from_json(fields)
                digest = _chain(digest, start)
                if stored_digest != digest or start.number != len(starts) + 1:
                    break
                starts.append(start)
        return starts


def restore_index(exported: Mapping[str, Any]) -> None:
    """Put the index of a checkpoint into the cache, unless the cache knows as many windows of the stream.

    exported: the result of `WindowIndex.export`, or an empty mapping.
    """
    key, lines = exported.get("key"), exported.get("lines")
    if not isinstance(key, str) or not re.fullmatch("[0-9a-f]+", key) or not isinstance(lines, list):
        return
    index = WindowIndex(key)
    starts = index._parse(lines)
    if len(starts) > len(index.read()):
        index.write(starts)


def _chain(digest: str, start: WindowStart) -> str:
    """Return the hash of a line of the index. `digest` is that of the line before."""
    return hashlib.blake2b((digest + json.dumps(start.to_json())).encode(), digest_size=12).hexdigest()
