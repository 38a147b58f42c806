"""Parts for your own loop: the beginning and the end that `recipes/fork_*.py` share with `minilm.train.train`.

Such a loop is short because it has no checkpoints and no evaluation; `minilm/train.py` shows how to do both.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from minilm.config import Config
from minilm.data.batch_plan import Plan
from minilm.data.corpus import PreparedData
from minilm.distributed.hardware import Precision
from minilm.distributed.launch import finish, first_on_each_host, start, together
from minilm.distributed.sharding import is_sharded
from minilm.models.compatibility import check_compatibility
from minilm.models.head import Head
from minilm.models.sparse_head import SparseHead
from minilm.objectives.objective import prepare
from minilm.runs.checkpoint import Progress
from minilm.runs.hub_upload import push
from minilm.runs.model_export import save_model
from minilm.runs.output_folder import choose_output_dir, claim_output_dir
from minilm.runs.recorder import Recorder, open_recorder
from minilm.runs.run_facts import write_results
from minilm.runs.verify_head import verify_head
from minilm.train import lay_plan
from minilm.utils.folder_lock import unlock_folder


@dataclass(frozen=True, kw_only=True)
class Begun:
    """The state of a loop before it builds its model."""

    accelerator: Accelerator
    precision: Precision
    folder: Path
    """The output folder; it is still empty."""
    prepared: PreparedData
    push_to_hub: str | None = None
    """The repository of the hub that gets the result."""


def begin(config: Config, name: str) -> Begun:
    """Join the job, choose the output folder, by default out/NAME, and prepare the data; ValueError as from `train`."""
    if config.run.resume is not None:
        raise ValueError("this recipe writes no checkpoints, so it cannot resume: leave run.resume out")
    accelerator, precision = start(config.run)
    if is_sharded(accelerator):
        raise ValueError("the loop of this recipe does not support sharding: launch it with --multi_gpu")
    folder, _ = together(lambda: choose_output_dir(config.run, name), main_only=True)
    prepared = first_on_each_host(accelerator, lambda: prepare(config))
    return Begun(
        accelerator=accelerator,
        precision=precision,
        folder=folder,
        prepared=prepared,
        push_to_hub=config.run.push_to_hub,
    )


def start_recording(begun: Begun, config: Config, head: Head) -> tuple[Plan, int, Recorder]:
    """Check the model, claim the output folder and announce the run.

    Returns the plan, the number of steps and the recorder.
    """
    accelerator, folder, prepared = begun.accelerator, begun.folder, begun.prepared
    check_compatibility(head, prepared)
    if isinstance(head, SparseHead):
        verify_head(config, head, prepared)
    plan = together(lambda: lay_plan(config, accelerator, head, prepared.train))
    total = config.run.count_steps(plan.steps_per_epoch)
    together(lambda: claim_output_dir(folder, config.run, head.model), main_only=True)
    recorder, _ = open_recorder(accelerator, config, folder, head, plan, prepared, total, begun.precision, Progress())
    return plan, total, recorder


def end(begun: Begun, recorder: Recorder, networks: dict[str, Any]) -> dict[str, float]:
    """Save the models, leave the job, publish where `run.push_to_hub` asks for it, and return the totals.

    networks: models of transformers, by their subfolders of the output folder; "." is the folder. The loop must delete
    its prepared model before: see `minilm.distributed.launch.finish`.
    """
    main = begun.accelerator.is_main_process
    results = recorder.conclude({})
    files = list[str]()
    if main:
        for part, network in networks.items():
            (begun.folder / part).mkdir(exist_ok=True)
            saved = save_model(network, begun.prepared.tokenizer, begun.folder / part)
            files += [str(Path(part, name)) for name in saved]
        write_results(begun.folder, results)
    begun.accelerator.free_memory()
    finish(begun.accelerator)
    if main and begun.push_to_hub is not None:
        push(begun.push_to_hub, begun.folder, files)
    unlock_folder(begun.folder)
    return results
