"""The content of a compressed file in a temporary file, so that any place of it can be read."""

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from minilm.utils.cache import CacheError


@contextmanager
def unpack(packed: Any, path: str) -> Iterator[IO[bytes]]:
    """Yield a temporary file with what `packed` yields when it is read, at its beginning.

    path: the name of the compressed file. Raise CacheError if the disk is full, and the errors of `packed`.
    """
    try:
        with tempfile.TemporaryFile() as unpacked:
            shutil.copyfileobj(packed, unpacked)
            unpacked.seek(0)
            yield unpacked
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CacheError(
            f"the disk is full while {path} is unpacked in {tempfile.gettempdir()}: free some space there, or set "
            "TMPDIR to a folder on another disk"
        ) from error
