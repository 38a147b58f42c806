"""Saving of checkpoints: the state is copied in memory, and a thread writes the copy to disk during the next steps."""

import contextlib
import dataclasses
import json
import logging
import shutil
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minilm.config import Config
from minilm.config.serialization import to_dict
from minilm.distributed.sharding import gather_whole
from minilm.models.lora import has_adapter, merge_adapter, select_adapter_weights
from minilm.runs.checkpoint import (
    ADAPTER,
    MANIFEST,
    OPTIMIZER,
    STATE,
    Progress,
    find_complete_checkpoints,
    find_leftovers,
    remove_old_checkpoints,
)
from minilm.runs.model_export import save_tokenizer
from minilm.runs.optimizer_state import collect_optimizer_state, describe_optimizer
from minilm.utils.atomic_files import hash_file, replace_folder
from minilm.utils.progress import quiet_transformers

log = logging.getLogger("minilm")


class CheckpointSaver:
    """Saves the checkpoints of a run. The run only waits for a copy in memory; a thread writes the copy to disk.

    The thread writes at most one checkpoint at a time. When that one is complete, it removes older ones, except the
    newest `run.keep_last` and the best by `run.best_metric`. If a write fails, the next call of `save` or `wait` raises
    OSError, and older checkpoints are untouched.

    enabled: True on the one process of the job that writes. inputs: the result of
    `minilm.runs.run_inputs.collect_inputs`.
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
        enabled: bool,
    ) -> None:
        self.folder, self.network, self.optimizer, self.tokenizer = folder, network, optimizer, tokenizer
        self.config, self.inputs = config, inputs
        self.enabled = enabled and config.run.save_every > 0
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        if self.enabled:
            for leftover in find_leftovers(folder):
                shutil.rmtree(leftover, ignore_errors=True)

    def due(self, step: int, *, last: bool, better: bool) -> bool:
        """Return whether to save after this step.

        That is true every `run.save_every` steps, at the end of the run (`last`), and with `run.load_best` after an
        evaluation that was the best so far (`better`).
        """
        run = self.config.run
        return run.save_every > 0 and (last or step % run.save_every == 0 or (better and run.load_best))

    def save(self, progress: Progress) -> None:
        """Copy the state, begin to write it to `checkpoint-<step>`, and return. Every process of the job calls it."""
        self.wait()
        # The weights come first, since state_dict makes FSDP restore the shards that the optimizer refers to.
        weights = gather_full_state(self.network.state_dict(keep_vars=True), keep=self.enabled)
        moments = gather_full_state(collect_optimizer_state(self.optimizer, self.network), keep=self.enabled)
        if not self.enabled:
            return
        scaler = getattr(self.optimizer, "scaler", None)  # accelerate's wrapper has one under fp16
        state = {
            "progress": dataclasses.asdict(progress),
            "config": to_dict(self.config),
            "inputs": self.inputs,
            "scaler": {} if scaler is None else scaler.state_dict(),
            "optimizer": describe_optimizer(self.optimizer),
        }
        arguments = (progress.step, state, weights, moments)
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the checkpoint is on disk. Raise OSError if it could not be written."""
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

    def _write(self, step: int, state: dict[str, Any], weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        target = self.folder / f"checkpoint-{step}"
        try:
            with replace_folder(target) as temporary:
                with quiet_transformers():
                    # `resume` needs the parameter names of the model in memory. The original format may have others.
                    whole = merge_adapter(self.network, weights)
                    self.network.save_pretrained(temporary, state_dict=whole, save_original_format=False)
                    save_tokenizer(self.tokenizer, temporary)
                save_file(moments, temporary / OPTIMIZER)
                if has_adapter(self.network):
                    save_file(select_adapter_weights(self.network, weights), temporary / ADAPTER)
                (temporary / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
                files = {path.name: hash_file(path) for path in sorted(temporary.iterdir())}
                (temporary / MANIFEST).write_text(json.dumps(files, indent=2) + "\n", encoding="utf-8")
        except Exception as error:  # wait() raises it again in the thread that trains
            reason = getattr(error, "strerror", None) or error
            self._error = OSError(f"{target} could not be written: {reason}; older checkpoints are untouched")
            return
        try:
            remove_old_checkpoints(self.folder, step, self.config.run)
        except OSError as error:
            log.warning(f"{target} is saved, but an older checkpoint could not be removed: {error}")


def gather_full_state(tensors: dict[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Return a whole copy of each tensor on the CPU if `keep` is True, else an empty dictionary.

    Every process calls it, since each may hold a shard of the tensors. Tied weights are one tensor with two names, and
    so are their copies.
    """
    copies = {}
    for tensor in {id(tensor): tensor for tensor in tensors.values()}.values():
        gathered = gather_whole(tensor)
        if keep:
            copies[id(tensor)] = gathered.detach().to("cpu", copy=True)
    return {name: copies[id(tensor)] for name, tensor in tensors.items()} if keep else {}
