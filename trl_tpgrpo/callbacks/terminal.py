"""Printing that never ends a run, even if the terminal is closed or cannot show a character."""

import sys
from contextlib import suppress

from tqdm import tqdm
from tqdm.utils import ObjectWrapper


def show(text: str) -> None:
    """Print a text above progress bars; escape characters that the terminal does not support."""
    encoding = sys.stdout.encoding or "utf-8"
    with suppress(OSError, ValueError):  # a pipe without reader, a closed file
        tqdm.write(text.encode(encoding, "backslashreplace").decode(encoding))


class Stream(ObjectWrapper):
    """Stream of a progress bar that ignores broken pipes."""

    def __eq__(self, other: object) -> bool:
        return self._wrapped == getattr(other, "_wrapped", other)  # used by tqdm to clear the bar before a line

    __hash__ = ObjectWrapper.__hash__

    def write(self, text: str) -> None:
        """Write, if possible."""
        with suppress(OSError, ValueError):
            self._wrapped.write(text)

    def flush(self) -> None:
        """Flush, if possible."""
        with suppress(OSError, ValueError):
            self._wrapped.flush()
