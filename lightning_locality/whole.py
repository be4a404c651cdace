"""Files that are written whole or not at all."""

from __future__ import annotations

__all__ = ["written_whole"]

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def written_whole(path: Path) -> Iterator[TextIO]:
    """Open a text file for writing that takes the place of another only once it is complete.

    Args:
        path: The file; where writing fails, what is there stays.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "note.txt"
        >>> with written_whole(path) as file:
        ...     _ = file.write("all")
        ...     before = path.exists()
        >>> before, path.read_text()
        (False, 'all')
    """
    temporary = path.with_name(path.name + ".part")
    # no translation of line ends: csv writes its own
    with temporary.open("w", newline="") as file:
        yield file
    os.replace(temporary, path)
