"""An example of an objective: the token ids of one row, or of several rows that belong together, and a target."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NO_TARGET = -100
"""The target of a token that is not to be predicted, as in transformers and PyTorch."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One example. Give `ids`, or `rows` if several rows belong together, such as a question and its answers.

    The target is one of these: `targets` has an integer for each token, `target` one value for the whole example. All
    examples of a run must have the same kind of target.
    """

    ids: Sequence[int] = ()
    """The token ids of the row, special tokens included."""
    rows: Sequence[Sequence[int]] = ()
    """The token ids of each row, if the example has several."""
    type_ids: Sequence[int] | Sequence[Sequence[int]] | None = None
    """The token types of `ids`, or of each of `rows`. Default: none, which most models read as 0."""
    targets: Sequence[int] | None = None
    """An integer for each token of `ids`: what to predict there, or `NO_TARGET`."""
    target: Any = None
    """An integer, a float, or a list of one of these, such as [start, end]."""
    note: Any = None
    """What the figures of an evaluation need beside the outputs, such as a text: any value that JSON can hold. Training
    does not keep it."""

    def __post_init__(self) -> None:
        if bool(len(self.ids)) == bool(len(self.rows)):
            raise ValueError("an Example needs `ids` with at least one token, or `rows`")
        if self.rows and not all(map(len, self.rows)):
            raise ValueError("an Example has a row without a token")
        if self.targets is not None and self.target is not None:
            raise ValueError("an Example has `targets` for its tokens, or one `target`, but not both")
        if self.targets is not None and (self.rows or len(self.targets) != len(self.ids)):
            raise ValueError(f"an Example has {len(self.targets)} targets for {len(self.ids)} ids: give one for each")
        if self.type_ids is not None and [*map(len, self.all_type_ids)] != [*map(len, self.all_rows)]:
            raise ValueError("an Example has `type_ids` of another length than its `ids` or `rows`")

    @property
    def all_rows(self) -> Sequence[Sequence[int]]:
        """The rows, also if there is only one."""
        return self.rows or [self.ids]

    @property
    def all_type_ids(self) -> Any:
        """The token types of each row. There must be `type_ids`."""
        return self.type_ids if self.rows else [self.type_ids]


@dataclass(frozen=True)
class Remark:
    """Something that the log says about the rows of a run. `Objective.examples` may yield it between the examples.

    The counts of all remarks with the same text are added up, and each text is one line of the log, also if the
    examples come from the cache: `Remark("rows are cut", 3)` becomes "training documents: 3 rows are cut".
    """

    text: str
    count: int = 1
