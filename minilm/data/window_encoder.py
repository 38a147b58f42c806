"""Encode a window of a stream in a process of its own while the run trains: `encode_ahead` starts it.

The process reads the settings of the stream as JSON and opens the stream anew. It inherits the lock of the stream, so
that a host runs one encoder at a time. An error is not reported: the process that needs the window encodes it again,
and raises the error itself.
"""

import json
import logging
import math
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np
import psutil
from transformers import AutoTokenizer

from minilm.config import Config
from minilm.config.serialization import from_dict, to_dict
from minilm.data.corpus import ExampleForm
from minilm.data.shards import open_pools
from minilm.data.stream_windows import EncodingCancelledError, StreamWindows
from minilm.data.tokenizer import store_tokenizer

log = logging.getLogger("minilm")

# An encoder that gets a smaller share of a processor than this, over so many seconds, does not finish in useful time.
_LEAST_SHARE, _WATCH_SECONDS = 0.1, 2.0
# A process takes seconds to start. In that time, the run encodes a window of fewer tokens itself.
_LEAST_TOKENS = 2**20
_SETTINGS = ("revisions", "identity", "words", "tokens", "seed", "held_out", "examples", "row_tokens")
# The encoders that this process has started.
_encoders = list["subprocess.Popen[bytes]"]()


def has_encoder(windows: StreamWindows) -> bool:
    """Return whether the windows are encoded ahead of time. Small ones are left to the process that needs them."""
    return windows.tokens >= _LEAST_TOKENS


def encode_ahead(windows: StreamWindows, number: int) -> None:
    """Start a process that encodes a window, unless it is in the cache or another process encodes. Do not wait for it.

    The window before must have been opened.
    """
    if not has_encoder(windows):
        return
    _encoders[:] = [encoder for encoder in _encoders if encoder.poll() is None]
    with windows.locked_to_encode(number) as lock:
        if lock is None:
            return
        try:
            _encoders.append(_start_encoder(describe_windows(windows), number, lock))
        except OSError as error:
            log.warning(f"no process could be started to encode window {number + 1} ahead of time ({error.strerror})")


def _start_encoder(description: dict[str, Any], number: int, lock: int) -> "subprocess.Popen[bytes]":
    with tempfile.TemporaryFile("w+") as file:
        json.dump({"windows": description, "number": number, "run": os.getpid()}, file)
        file.seek(0)
        return subprocess.Popen(
            [sys.executable, "-m", "minilm.data.window_encoder"],
            stdin=file,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "TOKENIZERS_PARALLELISM": "true",
            },
            pass_fds=[lock],
            # A signal to the run's group must not reach it. It ends when this process is gone. Linux compares the
            # priorities of processes of one session only, so it stays in that of the run.
            process_group=0,
        )


def end_starved_encoders(windows: StreamWindows, number: int) -> None:
    """Wait for the encoders of this process if a window is needed now, and end those that hardly run.

    Other programs then take all processors. The caller encodes the window itself, with its own priority.
    """
    for encoder in _encoders:
        while not windows.is_encoded(number) and encoder.poll() is None:
            before = _processor_seconds(encoder.pid)
            try:
                encoder.wait(_WATCH_SECONDS)
            except subprocess.TimeoutExpired:
                if _processor_seconds(encoder.pid) - before < _LEAST_SHARE * _WATCH_SECONDS:
                    log.warning(f"other programs take all processors: the run itself encodes window {number + 1}")
                    encoder.kill()
                    encoder.wait()


def _processor_seconds(process: int) -> float:
    """Return the processor time that a process has used, which may have ended."""
    with suppress(psutil.NoSuchProcess):
        times = psutil.Process(process).cpu_times()
        return float(times.user + times.system)
    return math.inf


def _run_when_idle() -> None:
    """Let this process run only where the training, and all else, leaves a processor idle.

    A step waits for each of its threads, so that it loses much more than the share of a processor that one of them
    lacks.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    os.nice(19)


def describe_windows(windows: StreamWindows) -> dict[str, Any]:
    """Return the settings of a stream as JSON types, from which `open_windows` opens it anew in another process."""
    form = {**asdict(windows.form), "prefix": windows.form.prefix.tolist(), "suffix": windows.form.suffix.tolist()}
    return {
        "key": windows.key,
        "stamps": _list_stamps(windows),
        "data": to_dict(Config(data=windows.data))["data"],
        "tokenizer": store_tokenizer(windows.tokenizer),
        "form": form,
        **{name: getattr(windows, name) for name in _SETTINGS},
    }


def open_windows(description: dict[str, Any]) -> StreamWindows:
    """Return the stream that `describe_windows` described. Raise ValueError if it is no longer the same."""
    data = from_dict({"data": description["data"]}).data
    pools = open_pools(data, description["revisions"], weighted=bool(data.weights))
    assert pools is not None
    form = description["form"]
    form = {**form, **{name: np.array(form[name], np.int64) for name in ("prefix", "suffix")}}
    windows = StreamWindows(
        data=data,
        pools=pools,
        tokenizer=AutoTokenizer.from_pretrained(description["tokenizer"], trust_remote_code=False),
        form=ExampleForm(**{**form, "around": tuple(form["around"])}),
        **{name: description[name] for name in _SETTINGS},
    )
    if [windows.key, _list_stamps(windows)] != [description["key"], description["stamps"]]:
        raise ValueError("the files of the stream have changed")
    return windows


def _list_stamps(windows: StreamWindows) -> Any:
    return json.loads(json.dumps([shard.stamp for pool in windows.pools for shard in pool.shards]))


def encode_from_input() -> None:
    """Encode the window that the standard input names. The process has inherited the stream's lock."""
    _run_when_idle()
    request = json.load(sys.stdin)
    with suppress(EncodingCancelledError, ValueError):
        open_windows(request["windows"]).encode_locked(request["number"], lambda: os.getppid() != request["run"])


if __name__ == "__main__":
    encode_from_input()
