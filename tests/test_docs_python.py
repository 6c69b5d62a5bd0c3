"""Each block of Python in the documentation runs, each of YAML and JSON is read.

A page's blocks run from top to bottom in one namespace, as a reader would type them, on the CPU, with one small update
for each training. A statement at the top level of a block is left out only if

- it has `...` for an argument, which the reader is to fill in,
- it names a repository on the Hub,
- it imports a module of `OF_THE_READER`, or
- it uses a name that such a statement would have defined.

Everything else runs, so that a new block is run unless there is a reason. What is left out compiles all the same, its
calls have keyword arguments that exist, and its imports are tried.
"""

import ast
import importlib
import inspect
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from documents import PAGES, ROOT, Block, blocks, read_training
from test_trainer import build

import trl_tpgrpo
from trl_tpgrpo import TPGRPOConfig


OF_THE_READER = {"old_detector"}
PUBLIC = {name: getattr(trl_tpgrpo, name) for name in trl_tpgrpo.__all__}
"""Known in what is left out, also where a page does not import them once more."""

HUB_REPOSITORY = re.compile(r"(?!(?:outputs|data|demo|examples|docs)/)[\w.-]+/[\w.-]+")
WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
STRUCTURED = [block for page in PAGES for block in blocks(page, "yaml", "yml", "json")]


def needs_the_reader(statement: ast.stmt) -> bool:
    """Whether it has an argument to be filled in, a repository on the Hub, or a module that only the reader has."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return False  # defined, and not called
    for node in ast.walk(statement):
        if isinstance(node, ast.Constant) and node.value is ...:
            return True
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and HUB_REPOSITORY.fullmatch(node.value):
            return True
    return bool(imported_modules(statement) & OF_THE_READER)


def imported_modules(statement: ast.stmt) -> set[str]:
    if isinstance(statement, ast.Import):
        return {alias.name for alias in statement.names}
    return {statement.module or ""} if isinstance(statement, ast.ImportFrom) else set()


def names(statement: ast.stmt, context: type[ast.expr_context]) -> set[str]:
    """The names that a statement reads, or binds. Those in the body of a function are looked up when it is called."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name} if context is ast.Store else set()
    found = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, context)}
    if context is ast.Store and isinstance(statement, ast.Import | ast.ImportFrom):
        found |= {(alias.asname or alias.name).split(".")[0] for alias in statement.names}
    return found


def parts(block: Block, missing: set[str]) -> tuple[list[ast.stmt], list[ast.stmt]]:
    """The statements that run and those that are left out; `missing` are the names that the latter leave undefined."""
    run, left_out = [], []
    for statement in ast.parse(block.text, str(block)).body:
        if needs_the_reader(statement) or names(statement, ast.Load) & missing:
            left_out.append(statement)
            missing |= names(statement, ast.Store)
        else:
            run.append(statement)
            missing -= names(statement, ast.Store)
    return run, left_out


@pytest.fixture
def as_if_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder with the examples in it, on the CPU.

    Trainings end after one update, of one micro-batch if it has whole groups.
    """
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    initialise = TPGRPOConfig.__post_init__

    def shorter(config: TPGRPOConfig) -> None:
        config.use_cpu, config.max_steps, config.disable_tqdm = True, 1, True
        if config.per_device_train_batch_size % config.num_generations == 0 and config.gradient_accumulation_steps:
            config.gradient_accumulation_steps = 1
        initialise(config)

    monkeypatch.setattr(TPGRPOConfig, "__post_init__", shorter)


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_python_of_a_page_runs(page: Path, tmp_path: Path, as_if_typed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    script = types.ModuleType("__main__")  # where what a page defines is found again
    monkeypatch.setitem(sys.modules, "__main__", script)
    namespace: dict[str, Any] = vars(script)
    missing: set[str] = set()
    for block in blocks(page, "python"):
        run, left_out = parts(block, missing)
        for statement in left_out:
            if not imported_modules(statement) & OF_THE_READER:
                check_imports(statement)
            check_calls(statement, PUBLIC | namespace)
        for statement in run:
            if "trainer" in names(statement, ast.Load) and "trainer" not in namespace:
                namespace["trainer"] = build(tmp_path / "trainer")  # pages go on from one without saying so each time
            module = ast.Module([statement], type_ignores=[])
            ast.increment_lineno(module, block.line - 1)
            exec(compile(module, str(page), "exec"), namespace)


def check_imports(statement: ast.stmt) -> None:
    if isinstance(statement, ast.ImportFrom):
        module = importlib.import_module(str(statement.module))
        assert not [alias.name for alias in statement.names if not hasattr(module, alias.name)]


def check_calls(statement: ast.stmt, namespace: dict[str, Any]) -> None:
    """Keyword arguments, where what is called is known, are ones that it takes."""
    for call in (
        node for node in ast.walk(statement) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ):
        if call.func.id not in namespace:
            continue
        parameters = inspect.signature(namespace[call.func.id]).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            continue
        unknown = [
            keyword.arg for keyword in call.keywords if keyword.arg is not None and keyword.arg not in parameters
        ]
        assert not unknown, f"{call.func.id} takes no {unknown}"


def test_statements_are_left_out_for_a_reason_only() -> None:
    block = Block(
        Path("page.md"),
        1,
        "python",
        "from old_detector import Detector\n"
        "from trl_tpgrpo import TPGRPOTrainer\n"
        "detector = Detector('weights.pth')\n"
        "def reward(images): return [...]\n"
        "trainer = TPGRPOTrainer(..., reward_funcs=reward)\n"
        "load('outputs/run')\n"
        "load('me/run')\n"
        "trainer.train()\n"
        "detector = None\n"
        "print(detector, undefined)\n",
    )
    run, left_out = parts(block, set())
    assert [statement.lineno for statement in run] == [2, 4, 6, 9, 10]
    assert [statement.lineno for statement in left_out] == [1, 3, 5, 7, 8]


@pytest.mark.parametrize("block", STRUCTURED, ids=str)
def test_yaml_and_json_are_read(block: Block, tmp_path: Path) -> None:
    if block.language == "json":
        json.loads(block.text)
        return
    settings = yaml.safe_load(block.text)
    if not isinstance(settings, dict) or "compute_environment" in settings or "distributed_type" in settings:
        return  # no recipe, but a config of accelerate or the like
    path = tmp_path / "recipe.yaml"
    path.write_text(block.text)
    read_training(["--config", str(path), "--output_dir", str(tmp_path)])
