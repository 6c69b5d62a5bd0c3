"""Mistakes on the command line, typed as users type them: one line that says what would be right, and the status 2."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from trl_tpgrpo import cli


sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from mistakes import FILES, MISTAKES, RUN, write_files  # noqa: E402


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in FILES:
        sys.modules.pop(Path(name).stem, None)
    return tmp_path


@pytest.mark.parametrize("call", MISTAKES)
def test_a_mistake_is_one_line(call: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(shlex.split(call)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert MISTAKES[call] in lines[-1]
    assert lines[-1].startswith(f"trl-tpgrpo {call.split()[0]}: error: ")
    assert "Traceback" not in "".join(lines)


@pytest.mark.parametrize("call", ["trian", f"{RUN} --lerning_rate 1", f"{RUN} --dataset_name captions.csv"])
def test_what_files_tell_needs_no_pytorch(call: str, folder: Path) -> None:
    program = (
        "import sys; from trl_tpgrpo.cli import main; status = main(); assert 'torch' not in sys.modules; exit(status)"
    )
    command = [sys.executable, "-c", program, *call.split()]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1 and run.stdout == ""


def test_debug_shows_where() -> None:
    command = [sys.executable, "-m", "trl_tpgrpo", "train", "--lerning_rate", "1", "--debug"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1 and "Traceback" in run.stderr and "--lerning_rate" in run.stderr.splitlines()[-1]


def test_debug_with_a_value_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli._without_debug(["--debug", "underflow_overflow"]) == ["--debug", "underflow_overflow"]
    assert "TRL_TPGRPO_DEBUG" not in os.environ
    monkeypatch.setenv("TRL_TPGRPO_DEBUG", "")
    assert cli._without_debug(["--seed", "1", "--debug", "--bf16"]) == ["--seed", "1", "--bf16"]


def test_ctrl_c_and_a_closed_pipe_have_no_traceback(monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    for error, status in ((KeyboardInterrupt(), 130), (BrokenPipeError(), 141)):

        def fail(*_: object, error: BaseException = error) -> int:
            raise error

        monkeypatch.setattr(cli, "run", fail)
        monkeypatch.setattr(os, "dup2", lambda *_: None)
        assert cli.main(["evaluate"]) == status
    assert capfd.readouterr().err == "trl-tpgrpo evaluate: interrupted; run the same command to continue\n"


def test_what_is_no_mistake_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (KeyError("x"), AttributeError("x"), RuntimeError("x")):

        def fail(*_: object, error: Exception = error) -> int:
            raise error

        monkeypatch.setattr(cli, "run", fail)
        with pytest.raises(type(error)):
            cli.main(["train"])


def test_a_reward_that_fails_in_training_names_function_and_row(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "failing.py").write_text(
        "def failing(images, **columns):\n    return [0.0] * (len(images) - 1) + ['x']\n"
    )
    assert cli.main(shlex.split(f"{RUN} --reward_funcs failing.failing --output_dir out")) == 2
    assert "error: The reward function 'failing' returned" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("module", "function", "raises", "expected"),
    [
        ("trl_tpgrpo.trainer", "train", "a_library", False),  # a fault, whose traceback is needed
        ("trl_tpgrpo.trainer", "train", "trl_tpgrpo.data", True),  # a message of this package
        ("trl_tpgrpo.trainer", "__init__", "a_library", True),  # a setting that the library refuses
    ],
)
def test_mistakes_in_training_are_those_that_the_package_names(
    module: str, function: str, raises: str, expected: bool
) -> None:
    inner, outer = {"__name__": raises}, {"__name__": module}
    exec("def check():\n    raise ValueError('x')", inner)
    exec(f"def {function}():\n    check()", outer | inner | {"__name__": module}, outer)
    with pytest.raises(ValueError) as raised:
        outer[function]()
    assert cli.is_mistake(raised.value) is expected
