"""The chain of causes of an exception."""

from collections.abc import Iterator


def iterate_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and the exceptions that led to it, the latest first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
