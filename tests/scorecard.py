"""The scorecard of reliability: a table with a row for each promise. `pytest -m scorecard` prints it.

`@pytest.mark.scorecard(ROW)` puts a test into a row, and the fixture `figure` adds a result to that row.
"""

from collections import defaultdict
from collections.abc import Iterable

ROWS = {
    1: "the same run again",
    2: "stopped and resumed at every step",
    3: "saved on one process and resumed on two, and the reverse",
    4: "processes x micro-batches, padded and packed",
    5: "an epoch on 1, 2, 3 processes",
    6: "loader workers 0, 1, 4",
    7: "evaluation on 1, 2, 3 processes and several batch sizes",
    8: "masking over a million tokens",
    9: "the golden run",
    10: "no token depends on a later one or on another document",
    11: "one batch, overfitted",
    12: "killed at random moments and inside saves",
    13: "an error at each write, sync and rename of a save",
    14: "the disk full during a save",
    15: "a damaged checkpoint",
    16: "rotation of checkpoints",
    17: "SIGTERM and SIGINT at random moments",
    18: "a process that raises, is killed or hangs",
    19: "the link between two hosts cut",
    20: "wrong ways to launch",
    21: "steps without a finite gradient",
    22: "resumed with other settings",
    23: "a hostile checkpoint",
    24: "secrets in the environment",
    25: "memory over 2,000 steps",
    26: "resumed in the middle of a plan of a million examples",
    27: "two processes on a cold cache",
    28: "saved models in plain transformers",
    29: "the terminal, during a long step and after ctrl-C",
    30: "bad input",
    31: "situations from the field",
    32: "rows written and read back, in every format",
    33: "special ids, against plain transformers",
    34: "the same update in every fork and layout",
    37: "a refused run in a Python process, then a good one",
    40: "a damaged cache",
    41: "resumed after inputs changed",
    42: "signals to the process group",
    43: "two runs in one folder",
}


class Scorecard:
    """The results of the tests of each row."""

    def __init__(self) -> None:
        self._passed: dict[int, int] = defaultdict(int)
        self._failed: dict[int, int] = defaultdict(int)
        self._figures: dict[int, list[str]] = defaultdict(list)

    def add(self, row: int, passed: bool, figures: Iterable[str]) -> None:
        """Add the outcome of one test, with its figures."""
        (self._passed if passed else self._failed)[row] += 1
        self._figures[row] += [figure for figure in figures if figure not in self._figures[row]]

    def lines(self) -> list[str]:
        """Return the table: a line for each row, with its figures, or else the number of tests that passed."""
        lines = []
        for row, title in ROWS.items():
            passed, failed = self._passed[row], self._failed[row]
            result = "; ".join(self._figures[row]) or f"{passed} tests passed"
            state = "not run" if passed + failed == 0 else f"{failed} FAILED; {result}" if failed else result
            lines.append(f"{row:2}  {title:<56}  {state}")
        return lines
