"""Python in a process of its own that has the libraries already; a fresh interpreter imports them for 8 seconds.

It is forked from a server that does nothing else, and has a pid, streams, signals and an exit code like any other.
Tests of what an interpreter or the libraries do as they start call `subprocess` instead.
"""

import gc
import multiprocessing
import os
import runpy
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from io import TextIOWrapper
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired

import torch


CPU = {"ACCELERATE_USE_CPU": "true"}
LAUNCH = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
LAUNCHERS_FORK = {"PET_START_METHOD": "fork", "PET_RUN_PATH": "1"}  # torchrun's options; accelerate's calls torchrun's
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["trl_tpgrpo.trainer", "trl_tpgrpo.commands.train", "torch.distributed.run", "pytest"])


class Python:
    """What `subprocess.Popen` is for `python *arguments`, with pipes for what it prints."""

    def __init__(self, *arguments: object, cwd: Path = Path(), env: dict[str, str] | None = None):
        pipes = [SERVER.Pipe(duplex=False) for _ in ("stdout", "stderr")]
        environment = {**os.environ, **LAUNCHERS_FORK, **(env or {})}
        program = ([str(argument) for argument in arguments], cwd.resolve(), environment)
        self.process = SERVER.Process(target=_become, args=(*program, *(writer for _, writer in pipes)))
        self.process.start()
        for _, writer in pipes:
            writer.close()
        self.stdout, self.stderr = (open(os.dup(reader.fileno())) for reader, _ in pipes)

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float = 600) -> None:
        """Wait for its end; where that takes too long, kill it and all that it has started."""
        self.process.join(timeout)
        if self.returncode is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise TimeoutExpired(self.process.name, timeout)

    def communicate(self) -> tuple[str, str]:
        """Read both streams to their ends, and wait."""
        with ThreadPoolExecutor() as pool:
            output, errors = (pool.submit(stream.read) for stream in (self.stdout, self.stderr))
            self.wait()
            return output.result(), errors.result()


def run_python(*arguments: object, cwd: Path = Path(), env: dict[str, str] | None = None) -> CompletedProcess:
    """Do what `subprocess.run` does for `python *arguments`."""
    process = Python(*arguments, cwd=cwd, env=env)
    output, errors = process.communicate()
    return CompletedProcess(arguments, process.returncode, output, errors)


def _become(arguments: list[str], cwd: Path, environment: dict[str, str], stdout: Connection, stderr: Connection):
    """Give this process a group, streams, environment and folder of its own, and run the program."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the tests were started with, as by `nohup`
    for number, pipe in enumerate((stdout, stderr), start=1):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    gc.freeze()  # see conftest.py
    os.environ.clear()
    os.environ.update(environment)
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    sys.stdout, sys.stderr = (
        TextIOWrapper(open(number, "wb", buffering=0, closefd=False), encoding, errors, write_through=True)
        for number, errors in ((1, "strict"), (2, "backslashreplace"))
    )
    os.chdir(cwd)
    torch.set_num_threads(1)
    option, *others = arguments
    if option == "-c":
        sys.argv = [option, *others[1:]]
        sys.path.insert(0, str(cwd))
        exec(others[0], {"__name__": "__main__"})
    elif option == "-m":
        sys.argv = others
        sys.path.insert(0, str(cwd))
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(option).parent))
        runpy.run_path(option, run_name="__main__")
