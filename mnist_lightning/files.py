"""Files written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any


@contextmanager
def write_whole(path: str | os.PathLike[str]) -> Iterator[IO[Any]]:
    """Opens a binary file that takes the place of `path` only when the block ends without an exception.

    The bytes go to a temporary file in the same folder, reach the disk (fsync), and are renamed: a reader, or a machine
    that loses power, sees the old file or the new one.

    Raises:
        OSError: the folder can't be written or the disk is full; an older file at `path` is then untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o666 & ~_umask())  # NamedTemporaryFile makes 0600: colleagues couldn't read the result
            file.close()  # Windows neither renames nor deletes an open file
            os.replace(file.name, path)
        except BaseException:
            file.close()
            os.unlink(file.name)
            raise
    if os.name == "posix":  # the rename itself is only lasting once the folder is on disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
