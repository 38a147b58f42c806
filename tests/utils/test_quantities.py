"""Quantities in the form in which people write them."""

import pytest

from minilm.utils.quantities import format_amount, format_duration, format_rate, format_share


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0, "0.0 s"), (0.44, "0.4 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min")),
        *((125, "2 min 5 s"), (3599.6, "1 h"), (12_000, "3 h 20 min"), (86_400, "1 d"), (187_200, "2 d 4 h")),
    ],
)
def test_a_duration_has_at_most_two_units(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0"), (0.00012, "0.00012"), (1e-9, "1e-09"), (0.84, "0.84"), (8.19, "8.2"), (26.3, "26")),
        *((18_012.4, "18,012"), (-0.5, "-0.50")),
    ],
)
def test_an_amount_has_two_digits_or_more(value, text):
    assert format_amount(value) == text


def test_a_share_is_in_percent_and_a_rate_has_its_unit():
    assert (format_share(0.357), format_share(0.0819), format_share(0)) == ("36%", "8.2%", "0%")
    assert format_rate(26.3, "steps") == "26 steps/s"
