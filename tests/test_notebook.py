"""The notebook of the examples: it runs on the CPU, and its half for a GPU is a run that fits one."""

import ast
import importlib.util
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from peft import LoraConfig

import trl_tpgrpo
from trl_tpgrpo.commands.architectures import architecture_folder
from trl_tpgrpo.commands.plan import GIB, PlannedConfig, PlannedModel, estimate, peak


NOTEBOOK = Path(__file__).parents[1] / "examples/tpgrpo.ipynb"


def read() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def shown(cell: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """What the last line of a cell has shown."""
    return [output.data for output in cell.get("outputs", []) if output.output_type == "execute_result"]


def executed(folder: Path) -> nbformat.NotebookNode:
    """The notebook, run in an empty folder, without the warnings of libraries and second copies of images."""
    notebook = read()
    where = {"metadata": {"path": str(folder)}}
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where, record_timing=False)
    client.execute(env=environment)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not is_warning(output)]
            for output in cell.outputs:
                output.get("data", {}).pop("image/jpeg", None)
    return notebook


def is_warning(output: nbformat.NotebookNode) -> bool:
    return output.get("name") == "stderr" or "[WARNING]" in output.get("text", "")


def check_results(notebook: nbformat.NotebookNode) -> None:
    results = [data for cell in notebook.cells for data in shown(cell)]
    numbers = [ast.literal_eval(data["text/plain"]) for data in results if "image/png" not in data]
    (before, after), (without, trained) = (found.values() for found in numbers)
    assert after > before + 0.01 and trained > without + 0.01
    assert len(results) - len(numbers) == 3  # before and after, a trajectory, the plain pipeline's images


def test_it_runs_on_the_cpu_and_the_reward_rises(tmp_path: Path) -> None:
    check_results(executed(tmp_path))


def test_it_is_stored_with_the_outputs_of_a_run_on_the_cpu() -> None:
    """`python tests/test_notebook.py` stores them."""
    code = [cell for cell in read().cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    check_results(read())
    text = str([cell.outputs for cell in code])
    assert not re.search(r"/(tmp|home|root|work|usr|opt)/|Traceback|warning", text, re.IGNORECASE)
    assert NOTEBOOK.stat().st_size < 1_000_000


def test_it_installs_from_the_clone_that_it_is_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (cell,) = [cell for cell in read().cells if "%pip" in cell.source]
    command = '%pip install --quiet "trl-tpgrpo[testbed] @ {source}"'
    assert command in cell.source
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    names: dict[str, Any] = {}
    monkeypatch.chdir(NOTEBOOK.parent)
    exec(cell.source.replace(command, "pass"), names)
    assert names["source"] == NOTEBOOK.parents[1].as_uri()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="not in a clone of the repository"):
        exec(cell.source.replace(command, "pass"), names)
    exec(cell.source.replace(command, "pass").replace("SOURCE = None", "SOURCE = 'git+https://a/b'"), names)
    assert names["source"] == "git+https://a/b"


def a_gpu(monkeypatch: pytest.MonkeyPatch, free: float, total: float, bf16: bool = True) -> None:
    found = {"is_available": True, "mem_get_info": (int(free * GIB), int(total * GIB)), "get_device_name": "A card"}
    for name, value in (found | {"is_bf16_supported": bf16}).items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value, **options: value)


def test_its_half_for_a_gpu_does_not_start_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    a_gpu(monkeypatch, 3.25, 15)
    (cell,) = [cell for cell in read().cells if "mem_get_info" in cell.source]
    with pytest.raises(MemoryError, match=r"needs 13 GiB .* A card has 3.2 of 15.0 GiB free.* set ON_GPU = False"):
        exec(cell.source, {})


@pytest.mark.parametrize("bf16", [True, False])
def test_its_half_for_a_gpu_fits_the_memory_that_it_asks_for(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells as far as the trainer, with a trainer that keeps what it is given and a config that needs no GPU."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(trl_tpgrpo, "TPGRPOTrainer", lambda **arguments: given.update(arguments), raising=False)
    monkeypatch.setattr(trl_tpgrpo, "TPGRPOConfig", PlannedConfig, raising=False)
    a_gpu(monkeypatch, 13.5, 15, bf16)
    names: dict[str, Any] = {}
    for cell in read().cells:
        if cell.cell_type == "code" and "%pip" not in cell.source and not given:
            exec(cell.source, names)
    monkeypatch.undo()
    assert names["ON_GPU"] and isinstance(given["peft_config"], LoraConfig)
    args, dtype = given["args"], torch.bfloat16 if bf16 else torch.float16
    assert (args.bf16, args.fp16, names["LOADING"]["dtype"]) == (bf16, not bf16, dtype)
    model = PlannedModel(architecture_folder(given["model"], None), args, given["peft_config"], dtype)
    most = peak(estimate(args, model)) / GIB
    assert most < 0.95 * names["NEEDED"] / GIB and f"{most:.1f} GiB at its peak" in read().cells[0].source


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        nbformat.write(executed(Path(folder)), NOTEBOOK)
