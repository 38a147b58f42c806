"""What "it keeps working" means: a row each, with the tests that show it. `pytest -m scorecard` prints the table.

A test belongs to a row by `@pytest.mark.scorecard(ROW)`, and says what it found by the fixture `figure`.
"""

from collections import defaultdict
from collections.abc import Iterable

ROWS = {
    1: "the same run again",
    2: "stopped and resumed at every step",
    3: "saved on one process, resumed on two, and the reverse",
    4: "processes x micro-batches, padded and packed",
    5: "an epoch on 1, 2, 3 processes",
    6: "loader workers 0, 1, 4",
    7: "evaluation on 1, 2, 3 processes and several batch sizes",
    8: "masking over a million tokens",
    9: "the golden run",
    10: "no token sees what it must not",
    11: "one batch learnt by heart",
    12: "killed at random moments and inside saves",
    13: "an error at each write, sync and rename of a save",
    14: "the disk full during a save",
    15: "a damaged checkpoint",
    16: "rotation of checkpoints",
    17: "SIGTERM and SIGINT at random moments",
    18: "a process that raises, is killed, hangs",
    19: "the link between two hosts cut",
    20: "wrong ways to launch",
    21: "steps without a finite gradient",
    22: "resumed with other settings",
    23: "a hostile checkpoint",
    24: "secrets in the environment",
    25: "memory over 2,000 steps",
    26: "resumed in the middle of a plan of a million examples",
    27: "two processes on a cold cache",
    28: "what is saved, in plain transformers",
    29: "the terminal, during a long step and after ctrl-C",
    30: "bad input",
    31: "situations from the field",
    32: "rows written and read back, in every format",
    33: "special ids, against plain transformers",
    34: "the same update for every objective, fork and layout",
    37: "a refused run in a Python process, then a good one",
    40: "a damaged cache",
    41: "changed inputs before a resume",
    42: "signals to the process group",
    43: "two runs in one folder",
}


class Scorecard:
    """Collects what the tests of each row found."""

    def __init__(self) -> None:
        self._passed: dict[int, int] = defaultdict(int)
        self._failed: dict[int, int] = defaultdict(int)
        self._figures: dict[int, list[str]] = defaultdict(list)

    def add(self, row: int, passed: bool, figures: Iterable[str]) -> None:
        """The outcome of one test."""
        (self._passed if passed else self._failed)[row] += 1
        self._figures[row] += [figure for figure in figures if figure not in self._figures[row]]

    def lines(self) -> list[str]:
        """The table: a line a row, with the figures, or how many tests passed."""
        lines = []
        for row, title in ROWS.items():
            passed, failed = self._passed[row], self._failed[row]
            found = "; ".join(self._figures[row]) or f"{passed} tests passed"
            state = "not run" if passed + failed == 0 else f"{failed} FAILED; {found}" if failed else found
            lines.append(f"{row:2}  {title:<56}  {state}")
        return lines
