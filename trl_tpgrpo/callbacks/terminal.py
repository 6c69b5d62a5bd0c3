"""Printing that never ends a run, whatever the terminal: one that is gone, or one that cannot show a character."""

import sys
from contextlib import suppress

from tqdm import tqdm
from tqdm.utils import ObjectWrapper


def show(text: str) -> None:
    """Print a text above the progress bars; characters that the terminal does not have are escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    with suppress(OSError, ValueError):  # a pipe that nobody reads any more, a file that has been closed
        tqdm.write(text.encode(encoding, "backslashreplace").decode(encoding))


class Stream(ObjectWrapper):
    """Stream of a progress bar, which tqdm leaves to fail where a pipe is broken."""

    def __eq__(self, other: object) -> bool:
        return self._wrapped == getattr(other, "_wrapped", other)  # by which tqdm clears the bar before a line

    __hash__ = ObjectWrapper.__hash__

    def write(self, text: str) -> None:
        """Write what can be written."""
        with suppress(OSError, ValueError):
            self._wrapped.write(text)

    def flush(self) -> None:
        """Write what has been held back, if it can be written."""
        with suppress(OSError, ValueError):
            self._wrapped.flush()
