"""With unusual special ids, the loss is that of the plain model, or the run is refused (see `tests.matrix`)."""

import pytest

from tests.matrix import SITUATIONS, Result, try_special_ids

pytestmark = pytest.mark.scorecard(33)

TYPES = [
    ("masked", "roberta"),  # counts positions from the ids
    ("masked", "xlm"),  # guesses a mask from the ids
    ("masked", "bart"),
    ("causal", "llama"),
    ("classification", "roberta"),
    ("classification", "gpt2"),  # looks for a row's last token by the padding id
    ("classification", "bart"),  # reads the class off the end token
    ("token-classification", "xlm"),
    ("question-answering", "splinter"),  # looks for the id of a question's place
    ("multiple-choice", "roberta"),
]
REFUSED = {("bart", "each special token in texts"), ("bart", "no end token")}


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize(("head", "kind"), TYPES)
def test_special_ids_are_read_as_the_plain_model_reads_them(head: str, kind: str, situation: str) -> None:
    refused = head == "classification" and (kind, situation) in REFUSED
    assert try_special_ids(Result(head=head, kind=kind), situation) == ("refused" if refused else "equal")
