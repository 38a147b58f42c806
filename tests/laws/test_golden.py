"""The numbers of a run do not change by accident."""

import json

import pytest

from tests.laws.golden import FILE, golden_losses


def test_losses_are_the_golden_ones() -> None:
    assert golden_losses() == pytest.approx(json.loads(FILE.read_text()), abs=1e-4)
