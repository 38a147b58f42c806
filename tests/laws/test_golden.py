"""The numbers of a run do not change by accident."""

import json
from collections.abc import Callable

import pytest

from tests.laws.golden import FILE, golden_losses


@pytest.mark.scorecard(9)
def test_losses_are_the_golden_ones(figure: Callable[[str], None]) -> None:
    losses, expected = golden_losses(), json.loads(FILE.read_text())
    apart = max(abs(loss - other) for loss, other in zip(losses, expected, strict=True))
    figure(f"{len(losses)} losses differ by at most {apart:.1e} from the file")
    assert apart <= 1e-4
