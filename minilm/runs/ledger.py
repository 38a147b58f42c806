"""The ledger of a run: the loss of each evaluation example at each evaluation.

The folder `ledger` of a run's output folder holds safetensors files. E is the number of evaluation examples.

- `examples.safetensors`: `targets` int32[E], the number of targets of each example; for language models also
  `utf8_bytes` int32[E], the bytes of text that they stand for, and `document` int32[E], the number of the document of
  each example, unless examples join documents. The metadata `identity` is `ExampleTable.identity` as JSON.
- `eval-<step>.safetensors`: `loss` float32[E], the sum of the losses of each example's targets in nats; for classifiers
  and multiple choice also `correct` bool[E]. With `optim.ema`, `ema_loss` and `ema_correct` are those of the averages.

The sum of `loss` divided by the sum of `targets` is the evaluation loss of the step.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from minilm.config import Config, ObjectiveSettings
from minilm.utils.atomic_files import remove_path, write_atomically

if TYPE_CHECKING:
    from minilm.data.corpus import PreparedData

LEDGER = "ledger"
"""The subfolder of the output folder for the ledger."""
EXAMPLES = "examples.safetensors"
# The size of a ledger. Where the evaluations of a run need more, the newest ones stay, and at least one.
LEDGER_BYTES = 2**28
FACTS = {"targets": np.int32, "utf8_bytes": np.int32, "document": np.int32}
"""The dtypes of the arrays that are the same at each evaluation."""
# Settings of minilm's objectives that change the loss of an evaluation.
_LOSS_SETTINGS = {"temperature", "symmetric", "score_loss", "max_score"}
# The dtypes of the arrays that are not.
_VALUES = {"loss": np.float32, "correct": np.bool_, "ema_loss": np.float32, "ema_correct": np.bool_}


@dataclass(frozen=True, kw_only=True)
class ExampleTable:
    """What one evaluation knows of each example."""

    arrays: Mapping[str, NDArray[Any]]
    """Arrays of E elements by their names in the ledger, those of `examples.safetensors` among them."""
    identity: Mapping[str, str]
    """What the examples are: `objective`, its class; `loss`, the settings that its losses depend on, as JSON;
    `examples`, a hash of the documents as the tokenizer encoded them; `documents`, a hash of the documents and their
    labels alone; `overflow`, the setting `tokens.overflow`."""

    def __len__(self) -> int:
        return len(self.arrays["loss"])

    @property
    def mean_loss(self) -> NDArray[np.float64]:
        """The mean loss of the targets of each example in nats, float64[E]; 0 for an example without a target."""
        mean: NDArray[np.float64] = self.arrays["loss"] / np.maximum(1, self.arrays["targets"])
        return mean


def build_table(config: Config, prepared: "PreparedData", per_example: Mapping[str, NDArray[Any]]) -> ExampleTable:
    """Return the table of an evaluation. per_example: `EvaluationResult.per_example`, with a loss."""
    document = {} if prepared.eval.document is None else {"document": prepared.eval.document}
    known = {**per_example, **document}
    kinds: dict[str, Any] = {**FACTS, **_VALUES}
    arrays = {name: known[name].astype(kind) for name, kind in kinds.items() if name in known}
    return ExampleTable(arrays=arrays, identity=identify_examples(config, prepared))


def identify_examples(config: Config, prepared: "PreparedData") -> dict[str, str]:
    """Return `ExampleTable.identity`."""
    return {
        "objective": type(config.objective).__name__,
        "loss": json.dumps(_find_loss_settings(config.objective), sort_keys=True, default=str),
        "examples": prepared.eval.fingerprint,
        "documents": prepared.eval_documents,
        "overflow": config.tokens.overflow,
    }


def _find_loss_settings(settings: ObjectiveSettings) -> dict[str, Any]:
    """Return the settings that may change the loss of an evaluation: for an objective of the user, all of its own."""
    names = {field.name for field in dataclasses.fields(settings)}
    if type(settings).__module__ == ObjectiveSettings.__module__:
        names &= _LOSS_SETTINGS
    else:
        names -= {field.name for field in dataclasses.fields(ObjectiveSettings)}
    return {name: getattr(settings, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Writes the ledger of a run."""

    folder: Path
    """The output folder."""
    config: Config
    prepared: "PreparedData"

    def write(self, step: int, per_example: Mapping[str, NDArray[Any]]) -> None:
        """Write an evaluation after `step` steps, and remove the oldest ones that are too many."""
        if "loss" not in per_example:
            return
        table = build_table(self.config, self.prepared, per_example)
        (self.folder / LEDGER).mkdir(exist_ok=True)
        facts = {name: array for name, array in table.arrays.items() if name in FACTS}
        values = {name: array for name, array in table.arrays.items() if name in _VALUES}
        # One key, since safetensors writes several in an order of its own, and a run repeats to the byte.
        metadata = {"identity": json.dumps(dict(table.identity))}
        write_atomically(self.folder / LEDGER / EXAMPLES, save(facts, metadata))
        write_atomically(_evaluation_file(self.folder, step), save(values))
        size = sum(array.nbytes for array in values.values())
        for old in find_evaluations(self.folder)[: -max(1, LEDGER_BYTES // max(1, size))]:
            old.unlink()


def start_ledger(folder: Path, config: Config, prepared: "PreparedData", step: int) -> Ledger | None:
    """Return the ledger of a run at `step`, if `run.ledger` asks for one.

    Remove what an earlier run wrote after it, and all evaluations without `run.ledger`, since the last one counts as
    that of the run.
    """
    for path in find_evaluations(folder):
        if step_of(path) > step or not config.run.ledger:
            path.unlink()
    # A killed process leaves a file that it has not finished.
    for path in (folder / LEDGER).glob(".*.safetensors-*"):
        remove_path(path)
    return Ledger(folder=folder, config=config, prepared=prepared) if config.run.ledger else None


def find_evaluations(folder: Path) -> list[Path]:
    """Return the files of the evaluations in the ledger of an output folder, in the order of their steps."""
    return find_numbered(folder, "eval")


def find_numbered(folder: Path, kind: str) -> list[Path]:
    """Return the files `KIND-<number>.safetensors` in the ledger of an output folder, in the order of their numbers."""
    names = [path.stem.removeprefix(f"{kind}-") for path in (folder / LEDGER).glob(f"{kind}-*.safetensors")]
    numbers = sorted(int(name) for name in names if name.isdecimal())
    return [folder / LEDGER / f"{kind}-{number}.safetensors" for number in numbers]


def step_of(path: Path) -> int:
    """Return the step of a file of `find_evaluations`."""
    return int(path.stem.removeprefix("eval-"))


def read_evaluation(path: Path) -> ExampleTable:
    """Return the table of a file of `find_evaluations`. Raise ValueError if the ledger cannot be read."""
    facts, metadata = read_arrays(path.with_name(EXAMPLES))
    values, _ = read_arrays(path)
    arrays = facts | values
    if (
        not {"loss", "targets"} <= arrays.keys()
        or "identity" not in metadata
        or len({array.shape for array in arrays.values()}) != 1
    ):
        raise ValueError(f"{path} does not fit {EXAMPLES} beside it: remove the folder {path.parent}")
    return ExampleTable(arrays=arrays, identity=json.loads(metadata["identity"]))


def read_arrays(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Return the arrays and the metadata of a file of a ledger. Raise ValueError if it cannot be read."""
    try:
        with safe_open(path, "np") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _evaluation_file(folder: Path, step: int) -> Path:
    return folder / LEDGER / f"eval-{step}.safetensors"
