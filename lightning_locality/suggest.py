"""Names that were probably meant, for messages about wrong ones."""

from __future__ import annotations

__all__ = ["nearest"]

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the most similar of the known names, or nothing.

    Args:
        name: What was given.
        known: What there is.

    Example:
        >>> nearest("distnce", ["distance", "source"])
        " (did you mean 'distance'?)"
        >>> nearest("zzz", ["distance"])
        ''
    """
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {found[0]!r}?)" if found else ""
