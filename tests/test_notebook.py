"""The notebook of the examples: it runs on the CPU, and its half for a GPU is a run that fits one."""

import ast
import importlib.util
import os
from pathlib import Path
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


def test_it_is_stored_without_outputs() -> None:
    assert not [cell.id for cell in read().cells if cell.get("outputs") or cell.get("execution_count")]


def test_it_runs_on_the_cpu_and_the_reward_rises(tmp_path: Path) -> None:
    notebook = read()
    where = {"metadata": {"path": str(tmp_path)}}
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute(env=environment)
    results = [data for cell in notebook.cells for data in shown(cell)]
    numbers = [ast.literal_eval(data["text/plain"]) for data in results if "image/png" not in data]
    (before, after), (without, trained) = (found.values() for found in numbers)
    assert after > before + 0.01 and trained > without + 0.01
    assert len(results) - len(numbers) == 3  # before and after, a trajectory, the plain pipeline's images


def test_it_installs_from_the_clone_that_it_is_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (cell,) = [cell for cell in read().cells if "%pip" in cell.source]
    command = r'%pip install --quiet "{clones[0]}[testbed]"'
    assert command in cell.source
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    names: dict[str, Any] = {}
    monkeypatch.chdir(NOTEBOOK.parent)
    exec(cell.source.replace(command, "pass"), names)
    assert names["clones"][0] == NOTEBOOK.parents[1]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="not in a clone of the repository"):
        exec(cell.source.replace(command, "pass"), names)


def test_its_half_for_a_gpu_fits_one_of_24_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells as far as the trainer, with a trainer that keeps what it is given and a config that needs no GPU."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(trl_tpgrpo, "TPGRPOTrainer", lambda **arguments: given.update(arguments), raising=False)
    monkeypatch.setattr(trl_tpgrpo, "TPGRPOConfig", PlannedConfig, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    names: dict[str, Any] = {}
    for cell in read().cells:
        if cell.cell_type == "code" and "%pip" not in cell.source and not given:
            exec(cell.source, names)
    monkeypatch.undo()
    assert names["ON_GPU"] and isinstance(given["peft_config"], LoraConfig)
    model = PlannedModel(
        architecture_folder(given["model"], None), given["args"], given["peft_config"], torch.bfloat16
    )
    most = peak(estimate(given["args"], model)) / GIB
    assert most < 0.95 * 24 and f"{most:.1f} GiB at its peak" in read().cells[0].source
