"""How long things may be, so that the package stays one that a person can read.

`python tests/test_structure.py` prints the numbers.
"""

import ast
import inspect
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import trl_tpgrpo
from trl_tpgrpo.policies.loading import POLICIES


ROOT = Path(trl_tpgrpo.__file__).parent
FAMILY = re.compile(r"flux|sd3|sd\.?3|qwen|z.?image|krea|chroma|kontext|stable.?diffusion", re.IGNORECASE)
FILES = sorted(ROOT.rglob("*.py"))
HEART = ["config", "trainer.py", "data.py", "rollouts", "batches.py", "metrics.py", "algorithm", "policies",
         "rewards/scorer.py", "rewards/contract.py"]  # fmt: skip
VERBS = {
    "account", "activate", "add", "adjust", "advance", "allow", "answer", "append", "apply", "arrange", "ask",
    "assert", "assign", "average", "await", "balance", "begin", "bring", "build", "call", "cancel", "cast",
    "change", "check", "choose", "clear", "close", "collect", "combine", "command", "commit", "compare", "compile",
    "complete", "compute", "connect", "convert", "copy", "correct", "count", "create", "credit", "crop", "cut",
    "decide", "decode", "delete", "derive", "describe", "detect", "divide", "do", "download", "draw", "drop", "embed",
    "encode", "end", "enter", "estimate", "evaluate", "exchange", "expand", "explain", "fill", "find", "finish",
    "fit", "flip", "forget", "format", "free", "freeze", "gather", "get", "give", "go", "group", "guard", "guide",
    "hand", "handle", "hash", "hold", "import", "initialize", "initialise", "insert", "integrate", "join", "judge",
    "keep", "label", "launch", "lay", "leave", "let", "limit", "list", "listen", "load", "log", "look", "make",
    "map", "mark", "match", "measure", "merge", "mix", "move", "name", "normalize", "normalise", "note", "offload",
    "open", "order", "pad", "paint", "parse", "pass", "pick", "place", "plan", "precompute", "predict", "prepare",
    "print", "process", "push", "put", "queue", "raise", "rank", "read", "recompute", "record", "reduce", "refuse",
    "remember", "remove", "rename", "render", "repeat", "replace", "report", "resize", "resolve", "restore",
    "return", "reward", "roll", "rotate", "round", "run", "sample", "save", "say", "scale", "score", "select",
    "send", "separate", "serve", "set", "settle", "shard", "shift", "shorten", "show", "shuffle", "skip", "solve",
    "sort", "split", "stand", "standardise", "start", "step", "stop", "submit", "sum", "summarize", "summarise",
    "switch", "take", "tell", "test", "time", "tokenize", "track", "train", "transform", "truncate", "try", "turn",
    "undo", "unpack", "update", "use", "visit", "wait", "walk", "want", "warn", "weigh", "work", "wrap", "write",
    "yield",
}  # fmt: skip
"""First words of docstrings in use; a new verb gets a place here."""


@lru_cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def functions() -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    return [
        (f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node)
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def lines(paths: list[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def families() -> set[Path]:
    """The files that know one family each."""
    return {Path(inspect.getfile(policy)) for policy in POLICIES}


def heart() -> int:
    """Count the lines, blank ones aside, of what a change of the method touches, with `policies/` but for families."""
    named = [ROOT / name for name in HEART]
    files = [file for path in named for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    counted = [file for file in files if file not in families()]
    return sum(bool(line.strip()) for file in counted for line in file.read_text().splitlines())


def lengths() -> dict[str, int]:
    """Lines of each function, from its signature to its end."""
    return {name: int(node.end_lineno or 0) - node.lineno + 1 for name, node in functions()}


def percentile_90() -> int:
    return sorted(lengths().values())[int(0.9 * len(lengths()))]


def entries() -> list[str]:
    """What `ls` shows, besides the names that Python and PEP 561 prescribe."""
    prescribed = {"__init__.py", "__main__.py", "__pycache__", "py.typed"}
    return sorted({path.name for path in ROOT.iterdir()} - prescribed)


def internal_imports() -> float:
    """Statements that import from the package, a module."""
    found = [
        node for path in FILES for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom) and node.level
    ]
    return len(found) / len(FILES)


def loaded_by_one_family() -> list[str]:
    command = (
        "import sys, trl_tpgrpo.policies.sd3; print(*[name for name in sys.modules if name.startswith('trl_tpgrpo')])"
    )
    run = subprocess.run([sys.executable, "-c", command], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    return run.stdout.split()


def without_verb() -> tuple[list[str], int]:
    """Functions whose docstring does not begin with a verb, and the number of those that have one.

    Properties are nouns.
    """
    wrong, number = [], 0
    for name, node in functions():
        text = ast.get_docstring(node)
        is_property = any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
        if text and not is_property:
            number += 1
            if text.split()[0].strip(".,:;`").lower() not in VERBS:
                wrong.append(f"{name}: {text.splitlines()[0]}")
    return wrong, number


def test_ls_tells_the_story() -> None:
    assert len(entries()) <= 14, entries()


def test_a_family_is_a_short_file_and_the_base_stays_short() -> None:
    assert len(families()) >= 9
    assert not {path.name: lines([path]) for path in families() if lines([path]) >= 90}
    assert lines([ROOT / "policies/base.py"]) < 350


def words(path: Path) -> list[str]:
    """The names and texts of a file's code, without docstrings, which may say what was tried."""
    nodes = list(ast.walk(tree(path)))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    texts = [
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    ]
    kinds = {ast.Name: "id", ast.Attribute: "attr", ast.alias: "name", ast.FunctionDef: "name", ast.ClassDef: "name"}
    return texts + [getattr(node, kinds[type(node)]) for node in nodes if type(node) in kinds]


def test_only_policies_and_the_config_files_for_plans_know_a_family() -> None:
    known = {path.name: {word for word in words(path) if FAMILY.search(word)} for path in outside_policies()}
    assert not {name: found for name, found in known.items() if found}
    assert any(FAMILY.search(word) for word in words(ROOT / "policies/loading.py"))  # so it could have found some


def outside_policies() -> list[Path]:
    """The package's files but for `policies/` and the table of architectures."""
    return [path for path in FILES if not {"policies", "architectures"} & set(path.relative_to(ROOT).parts)]


def test_the_heart_and_the_whole_stay_small() -> None:
    # 3,200 and 9,000 after the redesign. Since then: settings compared on resuming, models in one file, weights that
    # mean the same everywhere, and for ten families texts of any length, images beside prompts, defaults of guidance
    # and weights that no gradient reaches (the heart); `evaluate`, hours, mistakes, help without PyTorch (the whole).
    # 3,700 with these. Then credit and families from outside, trust regions, noise by step, rewards of groups, latents
    # and states, evaluation at another size. 4,400 and 12,750 with these. Then safety: types of all settings, secrets,
    # checksums, a lock, deadlines, rewards that hang; and a credit that is fitted and drawn.
    assert heart() <= 4750
    assert lines(FILES) <= 14_000  # a model family takes 50 to 85


def test_files_and_functions_fit_a_screen() -> None:
    assert not {str(path.relative_to(ROOT)): lines([path]) for path in FILES if lines([path]) > 520}
    assert not {name: length for name, length in lengths().items() if length > 60}
    assert percentile_90() <= 25


def test_modules_know_few_others() -> None:
    assert internal_imports() <= 2.4  # 1.79 after the redesign; commands know many parts, a family two or three


def test_importing_one_family_loads_no_other() -> None:
    assert len(loaded_by_one_family()) <= 6, loaded_by_one_family()


def test_docstrings_begin_with_a_verb() -> None:
    wrong, number = without_verb()
    assert len(wrong) <= 0.05 * number, "\n".join(wrong)


if __name__ == "__main__":
    for name, value in {
        "entries": len(entries()),
        "lines of the heart that are not blank": heart(),
        "lines of the package": lines(FILES),
        "lines of the longest files": sorted(((lines([path]), path.name) for path in FILES), reverse=True)[:4],
        "lines of a function, p90 and most": (percentile_90(), max(lengths().values())),
        "internal imports a module": round(internal_imports(), 2),
        "modules loaded by one family": len(loaded_by_one_family()),
        "docstrings without a verb": (len(without_verb()[0]), without_verb()[1]),
    }.items():
        print(f"{name}: {value}")  # noqa: T201
