"""Text files, `.txt`: each line, each paragraph or the whole file is a document."""

from collections.abc import Iterator

from minilm.data.text_decoding import LinePlaces, check_byte_order_mark, find_line_end, open_text, strip_line_end


def read_text(
    path: str, encoding: str, document: str, places: LinePlaces | None = None
) -> Iterator[tuple[int, list[str]]]:
    """Yield the line at which each document begins, from 1, and the document as a list of one text.

    document: `line`, `paragraph` or `file`. Lines without a visible character separate paragraphs.
    places: the line to begin with, which is the first of a document. Default: the first line of the file.
    """
    newline = find_line_end(path)
    first, lines = 1, list[str]()
    with open_text(path, encoding, newline) as file:
        for number, line in enumerate(file, start=1) if places is None else places.iterate(file, encoding):
            check_byte_order_mark(path, number, line)
            text = strip_line_end(line, newline)
            if document == "line":
                yield number, [text]
            elif document == "paragraph" and not text.strip():
                if lines:
                    yield first, ["\n".join(lines)]
                    lines = []
            else:
                first = first if lines else number
                lines.append(text)
        if document == "file":
            yield 1, ["\n".join([*lines, ""]) if lines and line.endswith(newline) else "\n".join(lines)]
        elif lines:
            yield first, ["\n".join(lines)]
