"""The record of the steps of a run: the progress bar, log.jsonl and the trackers."""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minilm.data.batch_plan import Ids
from minilm.distributed.hardware import peak_memory
from minilm.runs.checkpoint import Progress
from minilm.runs.ledger import Ledger
from minilm.runs.loss_spikes import SpikeDetector
from minilm.utils.progress import show_progress

log = logging.getLogger("minilm")
Track = Callable[[dict[str, float], int], None]


class Recorder:
    """The progress bar and the log of the steps.

    The figures of a step are read when the next step is recorded, so that the device works on that step meanwhile.

    enabled: True on the main process. The recorders of the other processes only count steps, tokens and time.
    track: a function such as `accelerator.log`, which receives the figures as `train/…`, `eval/…` and `final/…`.
    peak_flops: FLOP/s of all processes' devices together, for MFU.
    ledger: keeps the losses of the evaluation examples, on the main process.
    """

    def __init__(
        self,
        folder: Path,
        track: Track,
        *,
        total_steps: int,
        peak_flops: float,
        progress: Progress,
        enabled: bool,
        ledger: Ledger | None = None,
    ) -> None:
        self.folder, self.track, self.peak_flops, self.enabled = folder, track, peak_flops, enabled
        self.ledger = ledger
        self.steps, self.tokens = progress.step, progress.tokens
        self.seconds, self.flops = progress.seconds, progress.flops
        # The number of steps without a finite gradient since the last step that had one. A step is counted when it is
        # written, so the last recorded step is not counted yet.
        self.bad_steps = 0
        self._rate = self._mfu = math.nan
        self._pending: dict[str, Any] | None = None
        self._examples = np.zeros(0, np.int64)  # ids of the examples of the pending step
        self._last_time = time.perf_counter()
        self._copied = torch.Event("cuda") if torch.cuda.is_available() else None
        self._log = _open_log(folder / "log.jsonl", progress.log_bytes) if enabled else None
        self._spikes = SpikeDetector(folder / "log.jsonl") if enabled else None
        self._bar = show_progress(
            total=total_steps, initial=progress.step, unit="step", disable=not enabled, smoothing=0.05
        )

    def record_step(
        self,
        *,
        epoch: float,
        lr: float,
        loss: Tensor,
        grad_norm: Tensor,
        examples: Ids,
        tokens: int,
        flops: float,
    ) -> None:
        """Record one finished step.

        loss, grad_norm: scalar tensors. examples: the ids of the step's examples. Another line of the log names
        these ids if the loss is far above the recent ones. tokens, flops: tokens without padding, and model FLOPs, of
        all processes together.
        """
        self._write_pending()
        seconds = self._count_time()
        self.steps += 1
        self.tokens += tokens
        self.flops += flops
        rate, mfu = tokens / seconds, flops / seconds / self.peak_flops
        self._rate = rate if math.isnan(self._rate) else 0.95 * self._rate + 0.05 * rate
        self._mfu = mfu if math.isnan(self._mfu) else 0.95 * self._mfu + 0.05 * mfu
        figures = torch.stack((loss, grad_norm)).to("cpu", non_blocking=self._copied is not None)
        if self._copied is not None:
            self._copied.record()
        self._examples = examples
        self._pending = {
            "step": self.steps,
            "epoch": round(epoch, 6),
            "loss": figures[0],
            "lr": lr,
            "grad_norm": figures[1],
            "tokens": self.tokens,
            "tokens_per_second": round(rate, 1),
            "mfu": round(mfu, 4),
            "seconds": round(self.seconds, 4),
            "memory_gb": round(peak_memory(loss.device) / 1e9, 3),
        }

    def record_evaluation(
        self, epoch: float, figures: dict[str, float], text: str, per_example: Mapping[str, NDArray[Any]]
    ) -> None:
        """Record the figures of an evaluation after the last recorded step, and show `text`, which sums them up.

        per_example: `EvaluationResult.per_example`, for the ledger.

        The time since the last call of `flush` does not count as training time.
        """
        if not self.enabled:
            return
        self._write("eval", {"step": self.steps, "epoch": round(epoch, 6), **figures})
        if self.ledger is not None:
            self.ledger.write(self.steps, per_example)
        self._bar.write(f"step {self.steps}, epoch {epoch:.2f}: {text}")
        self._last_time = time.perf_counter()

    def flush(self) -> None:
        """Wait for the last recorded step and write it to the log. The time until then counts as training time."""
        self._write_pending()
        self._count_time()

    def _count_time(self) -> float:
        """Add the seconds since the last call to the training time, and return them."""
        now = time.perf_counter()
        seconds, self._last_time = now - self._last_time, now
        self.seconds += seconds
        return seconds

    def current_progress(self, **best_fields: Any) -> Progress:
        """Write all steps recorded so far to the log, and return the progress of the run.

        best_fields: the result of `minilm.runs.best_checkpoint.BestEvaluation.state_after`.
        """
        self.flush()
        return Progress(
            step=self.steps,
            tokens=self.tokens,
            seconds=self.seconds,
            flops=self.flops,
            log_bytes=0 if self._log is None else self._log.tell(),
            **best_fields,
        )

    def first_bad_step(self) -> int:
        """Return the index, from 0, of the first of the last `bad_steps` steps."""
        return self.steps - (self._pending is not None) - self.bad_steps

    def totals(self) -> dict[str, float]:
        """Return steps, tokens without padding, training seconds, tokens per second and MFU of the run so far."""
        seconds = max(self.seconds, 1e-9)
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "train_seconds": round(self.seconds, 2),
            "tokens_per_second": round(self.tokens / seconds, 1),
            "mfu": round(self.flops / seconds / self.peak_flops, 4),
        }

    def record_results(self, figures: dict[str, float]) -> dict[str, float]:
        """Send the results to the trackers and return them: the figures of the last evaluation, and `totals`."""
        results = {**figures, **self.totals()}
        if self.enabled:
            self._track("final", results, self.steps)
        return results

    def close(self) -> None:
        """Write the last recorded step, and close the log and the progress bar."""
        try:
            if self._log is not None:
                self._write_pending()
                self._log.close()
                self._log = None
        finally:
            self._bar.close()

    def _write_pending(self) -> None:
        """Write the last recorded step to the log, with a line for a loss spike, and update the progress bar."""
        if self._pending is not None:
            line, self._pending = self._pending, None
            if self._copied is not None:
                # This waits for the copy of the figures, not for the work queued after it.
                self._copied.synchronize()
            loss, grad_norm = float(line["loss"]), float(line["grad_norm"])
            self.bad_steps = 0 if math.isfinite(grad_norm) else self.bad_steps + 1
            line["loss"] = loss if math.isfinite(loss) else None  # JSON has no infinity and no NaN
            line["grad_norm"] = grad_norm if math.isfinite(grad_norm) else None
            self._write("train", line)
            if self._spikes is not None and math.isfinite(loss) and (usual := self._spikes.detect(loss)) is not None:
                spike = {"step": line["step"], "spike_loss": loss, "usual_loss": usual}
                self._write("train", {**spike, "examples": self._examples.tolist()})
                self._bar.write(
                    f"step {line['step']}: loss {loss:.3f}, far above the recent mean {usual:.3f} (see log.jsonl)"
                )
            self._bar.set_postfix_str(
                f"loss {loss:.3f}, {self._rate:,.0f} tokens/s, MFU {self._mfu:.0%}", refresh=False
            )
            self._bar.update()

    def _write(self, part: str, line: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write((json.dumps(line) + "\n").encode())
            self._log.flush()
            self._track(part, line, line["step"])

    def _track(self, part: str, figures: dict[str, Any], step: int) -> None:
        numbers = {k.removeprefix("eval_"): v for k, v in figures.items() if isinstance(v, int | float) and k != "step"}
        self.track({f"{part}/{name}": value for name, value in numbers.items()}, step)


def _open_log(path: Path, keep_bytes: int) -> BinaryIO:
    """Open the log for appending after its first `keep_bytes`. A resumed run writes the lines after them again."""
    path.touch()
    log_file = path.open("r+b")
    log_file.truncate(min(keep_bytes, path.stat().st_size))
    log_file.seek(0, 2)
    return log_file


def write_samples(folder: Path, step: int, samples: dict[str, str]) -> None:
    """Append a line to log.jsonl for each text of `run.samples`, with the output of the final model."""
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        for text, output in samples.items():
            file.write(json.dumps({"step": step, "sample": text, "output": output}) + "\n")
