"""The exception that ends a run early, and the chain of causes of an exception. This file does not import torch."""

from collections.abc import Iterator


class TrainingStopped(Exception):  # noqa: N818 - it is not an error
    """Raised if minilm ends a run early or finds it finished. `status` is the exit status of the process."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def iterate_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and the exceptions that led to it, the latest first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
