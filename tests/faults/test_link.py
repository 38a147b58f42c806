"""The short form of tests/faults/link.py is all of it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.link import TIMEOUT, cut_the_link, train_apart, two_hosts


@pytest.fixture(autouse=True)
def _needs_namespaces() -> None:
    try:
        with two_hosts():
            pass
    except PermissionError as error:
        pytest.skip(str(error))


def test_two_hosts_with_different_tokens_train_as_one_process_that_has_all(tmp_path: Path) -> None:
    assert train_apart(tmp_path) < 1e-5


@pytest.mark.scorecard(19)
def test_two_hosts_train_as_one_and_when_their_link_is_cut_both_end_and_the_run_can_resume(
    tmp_path: Path, figure: Callable[[str], None]
) -> None:
    found = cut_the_link(tmp_path)
    assert found.difference < 1e-5
    assert found.seconds < TIMEOUT + 5
    assert found.tracebacks == 0
    for told in found.told:
        (line,) = told
        assert line.startswith("error: lost contact with another process of the job (")
        assert "--run.resume latest continues from checkpoint-" in line
    assert found.resumed == 10
    figure(
        f"losses on two hosts within {found.difference:.0e} of one process; both gone {found.seconds:.1f} s after "
        f"the cut with run.timeout {TIMEOUT}, one reason each; resumed"
    )
