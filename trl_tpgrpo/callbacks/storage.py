"""Safety of files: a lock against a second run in a folder, full disks, and checksums."""

import errno
import json
import logging
import os
import socket
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


logger = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"  # in a checkpoint: size and CRC-32 of each of its files
LOCK = "run.lock"  # in a folder that a run writes to; it stays there after the run
FULL = (errno.ENOSPC, errno.EDQUOT)
BLOCK, PROBE = 2**22, 2**20  # bytes read at once, and bytes that must fit on the disk


class NoRoom(OSError):
    """A disk is full; the message lists complete checkpoints."""


def in_main_process(accelerator: Accelerator, action: Callable[[], Any]) -> None:
    """Run a function in the main process; its exception is raised in all processes."""
    failure: list[Exception | None] = [None]
    if accelerator.is_main_process:
        try:
            action()
        except (OSError, ValueError) as error:
            failure = [error]
    broadcast_object_list(failure)
    if failure[0] is not None:
        raise failure[0]


@contextmanager
def locked(accelerator: Accelerator, folder: str | Path) -> Iterator[None]:
    """Hold the lock of a folder inside the context; the system frees it when the main process ends.

    Raises a `ValueError` that names the process with the lock. On a file system without locks, there is a warning.
    """
    with ExitStack() as stack:
        in_main_process(accelerator, lambda: stack.enter_context(_hold(Path(folder) / LOCK)))
        yield


def _hold(path: Path) -> Any:  # a file: locked while it is open
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")
    try:
        if fcntl is None:
            raise OSError("this system has no flock")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise ValueError(
            f"{path.parent} is in use by {holder}: wait until it ends, or choose another folder."
        ) from error
    except OSError as error:
        logger.warning("%s is not protected from a second run: its file system has no locks (%s).", path.parent, error)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def is_full(folder: str | Path, error: BaseException) -> bool:
    """Check whether an error comes from a full disk or quota; torch and safetensors do not report it."""
    if isinstance(error, OSError):
        return isinstance(error, NoRoom) or error.errno in FULL
    if not isinstance(error, RuntimeError | SafetensorError):
        return False
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(PROBE))
    except OSError as refused:
        return refused.errno in FULL
    return False


def write_checksums(checkpoint: Path, besides: str) -> None:
    """Write the checksums of all files of a checkpoint, except the one named `besides`."""
    files = [str(path.relative_to(checkpoint).as_posix()) for path in checkpoint.rglob("*") if path.is_file()]
    names = sorted({*files} - {besides, CHECKSUMS})
    (checkpoint / CHECKSUMS).write_text(json.dumps(checksums(checkpoint, names), indent=1))


def checksums(checkpoint: Path, names: list[str]) -> dict[str, str]:
    """Return size and CRC-32 of files of a checkpoint, by their names in it."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(_checksum, [checkpoint / name for name in names]), strict=True))


def _checksum(path: Path) -> str:
    if not path.is_file():
        return "missing"
    value = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            value = zlib.crc32(block, value)
        return f"{file.tell()} bytes with CRC-32 {value:08x}"


def check_files(checkpoint: Path) -> None:
    """Compare a checkpoint with its checksums; without checksums (earlier versions), check that files can be opened.

    Raises a `ValueError` that names the missing, empty, truncated or changed file.
    """
    path = checkpoint / CHECKSUMS
    if not path.exists():
        logger.warning("%s has no %s (of an earlier version?): its files are not compared.", checkpoint, CHECKSUMS)
        for file in filter(Path.is_file, checkpoint.rglob("*")):
            _open(file)
        return
    _open(path)
    written = json.loads(path.read_text())
    for name, now in checksums(checkpoint, list(written)).items():
        if now != written[name]:
            remedy = "Resume from another checkpoint"
            raise ValueError(f"{checkpoint / name} is damaged: it is {now}, and was {written[name]}. {remedy}.")


def _open(path: Path) -> None:
    """Raise a `ValueError` for a file that is empty or truncated, if its format shows it."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix in (".pt", ".pth"):
            zipfile.ZipFile(path).close()
        elif path.suffix == ".safetensors":
            safe_open(path, framework="pt").keys()
    except (OSError, ValueError, zipfile.BadZipFile, SafetensorError) as error:
        raise ValueError(f"{path} is damaged: it is empty or incomplete ({error}).") from error
