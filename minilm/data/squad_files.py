"""SQuAD's JSON files: one object, whose `data` holds articles with paragraphs. Each question is a row.

Rajpurkar et al. 2016 and 2018 describe the data sets, versions 1.1 and 2.0.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from minilm.data.columns import Column, check_keys
from minilm.data.json_files import read_values

COLUMN_NAMES = ["id", "title", "context", "question", "answers", "is_impossible"]
"""The columns of a row. `answers` is a list of objects, each with `text` and `answer_start`."""


def is_squad(path: str) -> bool:
    """Return whether a JSON file begins with an object whose `data` is a list of objects with `paragraphs`."""
    _, first = next(read_values(path, ()), (0, None))
    articles = first.get("data") if isinstance(first, dict) else None
    article = articles[0] if isinstance(articles, list) and articles else None
    return isinstance(article, dict) and "paragraphs" in article


def read_squad(path: str, columns: Sequence[Column]) -> Iterator[tuple[int, list[Any]]]:
    """Yield the number of each question in the file, from 1, and its cells of `columns`.

    The columns are `COLUMN_NAMES` and the other keys of a question. Raise ValueError that names the place in the file:
    for a part that is missing or has another type, for a question that is impossible and has answers, and for a key
    that occurs twice in an object, with different values.
    """
    values = read_values(path, [Column(role="all", name="data", kind="json")])
    _, squad = next(values)
    if next(values, None) is not None:
        raise ValueError(f"{path}: text follows the end of the object with the questions; remove it")
    check_keys(squad, path)
    number = 0
    for a, article in enumerate(squad["data"]):
        for p, paragraph in enumerate(_get(article, "paragraphs", list, f"{path}, data[{a}]")):
            place = f"{path}, data[{a}].paragraphs[{p}]"
            for q, question in enumerate(_get(paragraph, "qas", list, place)):
                number += 1
                where = f"{place}.qas[{q}]"
                answers = _get(question, "answers", list, where)
                impossible = question.get("is_impossible", False)
                if impossible and answers:
                    raise ValueError(f"{where}: the question is impossible but has answers; correct one of the two")
                row = {**question, "title": article.get("title", ""), "answers": answers, "is_impossible": impossible}
                row["context"] = _get(paragraph, "context", str, place)
                yield number, [column.get_cell(row, where) for column in columns]


def _get(value: Any, key: str, kind: type, where: str) -> Any:
    """Return the value of a key of an object. Raise ValueError if it is missing or of another type."""
    if not isinstance(value, dict) or not isinstance(value.get(key), kind):
        what = "list" if kind is list else "text"
        raise ValueError(f"{where}: SQuAD's files have an object with a {what} {key!r} here; correct the file")
    return value[key]
