"""Saving of checkpoints: the state is copied in memory, and threads write the copy to disk during the next steps.

Beyond a size, each process copies and writes a part (`minilm.runs.checkpoint_parts`). The main process gathers what the
others have written, and gives the checkpoint its name when all of it is on disk.
"""

import contextlib
import dataclasses
import logging
import shutil
import tempfile
import threading
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minilm.config import Config
from minilm.config.serialization import to_dict
from minilm.data.stream_windows import StreamWindows
from minilm.distributed.launch import lost_peer_as_error
from minilm.runs.checkpoint import Progress, find_complete_checkpoints, find_leftovers, remove_old_checkpoints
from minilm.runs.checkpoint_files import Share, WrittenFiles, complete_checkpoint, write_share
from minilm.runs.checkpoint_parts import assign_parts, count_parts
from minilm.runs.optimizer_state import collect_optimizer_state, describe_optimizer
from minilm.runs.state_tensors import find_units, gather_tensors, measure_units
from minilm.utils.atomic_files import remove_path

log = logging.getLogger("minilm")


class CheckpointSaver:
    """Saves the checkpoints of a run. The run only waits for a copy in memory; a thread writes the copy to disk.

    A process writes at most one checkpoint at a time. When that one is complete, the main process removes older ones,
    except the newest `run.keep_last` and the best by `run.best_metric`. If a write fails, the next call of `save` or
    `wait` on the main process raises OSError, and older checkpoints are untouched.

    Where the state has more than `PART_BYTES`, the processes that see the output folder share the writing. Each copies
    and writes one part.

    main: whether this is the main process of the job. inputs: the result of
    `minilm.runs.run_inputs.collect_inputs`. stream: the stream that the run reads, if any. revisions: the commit of
    each source that is a dataset on the hub.
    """

    def __init__(
        self,
        folder: Path,
        network: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        tokenizer: PreTrainedTokenizerBase,
        config: Config,
        inputs: dict[str, Any],
        *,
        main: bool,
        stream: StreamWindows | None = None,
        revisions: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.network, self.optimizer, self.tokenizer = folder, network, optimizer, tokenizer
        self.config, self.inputs, self.main, self.stream = config, inputs, main, stream
        self.revisions = dict(revisions or {})
        self.enabled = config.run.save_every > 0
        self._writers: list[int] | None = None
        self._group: dist.ProcessGroup | None = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        if self.enabled and main:
            for leftover in find_leftovers(folder):
                shutil.rmtree(leftover, ignore_errors=True)

    def due(self, step: int, *, last: bool, better: bool) -> bool:
        """Return whether to save after this step.

        That is true every `run.save_every` steps, at the end of the run (`last`), and with `run.load_best` after an
        evaluation that was the best so far (`better`).
        """
        run = self.config.run
        return self.enabled and (last or step % run.save_every == 0 or (better and run.load_best))

    def save(self, progress: Progress) -> None:
        """Copy the state, begin to write it to `checkpoint-<step>`, and return. Every process of the job calls it."""
        self.wait()
        if not self.enabled:
            return
        share = self._copy_share()
        if share.parts == 1 and not self.main:
            return
        scaler = getattr(self.optimizer, "scaler", None)  # accelerate's wrapper has one under fp16
        state = {
            "progress": dataclasses.asdict(progress),
            "config": to_dict(self.config),
            "inputs": self.inputs,
            "scaler": {} if scaler is None else scaler.state_dict(),
            "optimizer": describe_optimizer(self.optimizer),
            "windows": {} if self.stream is None else self.stream.export_index(),
            "revisions": self.revisions,
        }
        self._thread = threading.Thread(target=self._write, args=(progress.step, state, share), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the checkpoint is on disk. Raise OSError if it could not be written.

        On other processes than the main one, only wait until this process has written its part.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def resume_hint(self) -> str:
        """Wait until the checkpoint is on disk, and return a sentence that says how to resume the run."""
        with contextlib.suppress(OSError):
            self.wait()
        complete = find_complete_checkpoints(self.folder)
        return f"--run.resume latest continues from {complete[-1].name}" if complete else "no checkpoint was saved"

    def _copy_share(self) -> Share:
        """Return a copy of what this process writes. Every process calls it."""
        # The weights come first, since state_dict makes FSDP restore the shards that the optimizer refers to.
        weights = self.network.state_dict(keep_vars=True)
        moments = collect_optimizer_state(self.optimizer, self.network)
        units = find_units(weights)
        sizes = measure_units(units, weights, moments)
        parts, part = count_parts(sizes), 0 if self.main else None
        if parts > 1:
            writers = self._find_writers()
            parts, rank = min(parts, len(writers)), dist.get_rank() if dist.is_initialized() else 0
            part = writers.index(rank) if rank in writers[:parts] else None
        assigned = assign_parts(sizes, parts)
        own = {name for name, unit in units.items() if assigned[unit] == part}
        return Share(
            part=part,
            parts=parts,
            weights=gather_tensors(weights, own),
            moments=gather_tensors(moments, {key for key in moments if key.partition("/")[2] in own}),
        )

    def _find_writers(self) -> list[int]:
        """Return the ranks of the processes that see the output folder. Every process calls it.

        The main process comes first. Processes on other hosts see the folder if it is on a shared file system.
        """
        if self._writers is None and not dist.is_initialized():
            self._writers = [0]
        if self._writers is None:
            probe = Path(tempfile.mkdtemp(prefix=".probe-", dir=self.folder)) if self.main else Path()
            [name] = broadcast_object_list([probe.name])
            seen = gather_object([(self.folder / name).is_dir()])
            if self.main:
                probe.rmdir()
            self._writers = [rank for rank, one in enumerate(seen) if one]
            # The threads that write exchange their reports in a group of their own, beside the exchanges of the steps.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.config.run.timeout))
        return self._writers

    def _write(self, step: int, state: dict[str, Any], share: Share) -> None:
        """Write this process's share; on the main process, complete the checkpoint when all shares are on disk."""
        target = self.folder / f"checkpoint-{step}"
        files = WrittenFiles()
        try:
            if share.part is not None:
                folder = self.folder / f".checkpoint-{step}.part-{share.part + 1}.writing"
                files = write_share(folder, share, self.network, self.tokenizer)
        except Exception as error:
            # The main process must not wait for a part that does not come.
            files = WrittenFiles(failure=_explain(error))
        try:
            written = self._gather_from_all(files) if share.parts > 1 else [files]
            if not self.main:
                return
            complete_checkpoint(target, written, state)
        except Exception as error:  # wait() raises it again in the thread that trains
            self._error = OSError(f"{target} could not be written: {_explain(error)}; older checkpoints are untouched")
            return
        finally:
            if self.main:
                for part in self.folder.glob(f".checkpoint-{step}.part-*.writing"):
                    remove_path(part)
        try:
            remove_old_checkpoints(self.folder, step, self.config.run)
        except OSError as error:
            log.warning(f"{target} is saved, but an older checkpoint could not be removed: {error}")

    def _gather_from_all(self, files: WrittenFiles) -> list[WrittenFiles]:
        """Return what all processes have written, on the main process. The thread of each process calls it."""
        written: list[Any] = [None] * dist.get_world_size()
        with lost_peer_as_error():
            dist.gather_object(files, written if self.main else None, dst=0, group=self._group)
        return written


def _explain(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
