"""Write the tables of settings (docs/settings.md) and of public names (docs/api.md) from the source code.

`python docs/tables.py` writes both pages; `make docs` does so before it builds the site. The text outside the two
markers of a page is written by hand.
"""

import ast
import re
from pathlib import Path


ROOT = Path(__file__).parents[1]
MARKERS = ("<!-- Written by docs/tables.py from the source code -->", "<!-- End of the tables -->")
PARAMETER = re.compile(
    r"^ {4}(\w+) \((.+?)(?:, \*optional\*)?(?:, defaults to (`.+?`))?\): (.+(?:\n {8}.+)*)", re.MULTILINE
)
LINK = re.compile(r"\[`~?(?:[a-z_]\w*\.)*?((?:\w+\.)?\w+)`\]")

SAME = (
    "height", "width", "num_generations", "generation_batch_size", "gradient_accumulation_steps", "guidance_scale",
    "sde_type", "sde_window_size", "sde_window_range", "log_prob_type", "completion", "credit",
    "turning_point_first_step", "advantage_baseline", "scale_rewards", "advantage_scope", "num_iterations",
    "loss_type", "epsilon", "ema_update_every", "learning_rate", "weight_decay", "activation_checkpointing",
)  # fmt: skip
PAPER = dict.fromkeys(SAME, "the same") | {
    "adv_clip_max": "5 (demo code)",
    "beta": "4e-4 or 1e-4, by task; 1e-4 in the launch scripts",
    "bf16": "fp16 for SD3.5, bf16 for FLUX.1 (demo code)",
    "ema_decay": "0.9 from the start; here it rises to 0.9",
    "max_sequence_length": "128 (demo code)",
    "noise_level": "the same; FLUX.1: 0.8 (demo code) or 0.7 (launch script)",
    "num_inference_steps": "10; FLUX.1: 6",
    "num_inference_steps_eval": "40; FLUX.1: 28",
    "per_device_train_batch_size": "9; FLUX.1: 3 (demo code)",
    "turning_point_balance": "the same; in the demo code per micro-batch",
    "turning_point_trend": 'the same; `"global"` in the demo code',
}
"""Values of TurningPoint-GRPO (arXiv 2602.06422) and its demo code; docs/algorithm.md explains the differences."""


def table(*rows: tuple[str, ...]) -> str:
    """Return a Markdown table; the first row is its head."""
    head, *body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def settings() -> str:
    """Return a table for each group of settings in the docstring of `TPGRPOConfig`, and one of those not supported."""
    path = ROOT / "trl_tpgrpo/config/settings.py"
    _, *groups = re.split(r"^ *> Parameters (?:that control )?", docstring(path, "TPGRPOConfig"), flags=re.MULTILINE)
    parts = []
    for group in groups[:-1]:  # the last are those that are not set by hand
        title, _, text = group.partition("\n")
        rows = [("setting", "type", "default", "meaning", "paper")]
        for name, kind, default, meaning in PARAMETER.findall(text):
            meaning = plain(" ".join(meaning.split()))
            rows.append((f"`{name}`", kind, default or "`None`", meaning, PAPER.get(name, "")))
        title = plain(title[0].upper() + title[1:]).replace("Whose defaults differ", "Defaults that differ")
        parts.append(f"## {title}\n\n{table(*rows)}")
    reasons = ast.literal_eval(assigned(path, "UNSUPPORTED"))
    rows = [(f"`{name}`", reason) for name, reason in reasons.items()]
    return "\n\n".join([*parts, f"## Settings that are not supported\n\n{table(('setting', 'reason'), *rows)}"])


def api() -> str:
    """Return a table of the names on docs/api.md, with the methods that it lists."""
    rows = [("name", "purpose", "source")]
    text = (ROOT / "docs/api.md").read_text()
    for path, options in re.findall(r"^::: ([\w.]+)\n((?: {4}.+\n)*)", text, re.MULTILINE):
        file, name = find(path)
        members = re.search(r"members: \[(.+)\]", options)
        names = members[1].split(", ") if members else [] if name else public(file)
        for member in ["", *names]:
            purpose = docstring(file, *filter(None, (name, member)))
            title = f"`{name or file.stem}.{member}`" if member else f"**`{name or path}`**"
            source = file.relative_to(ROOT)
            if purpose:
                rows.append((title, sentence(purpose), f"[{source}](../{source})"))
    return table(*rows)


def find(path: str) -> tuple[Path, str]:
    """Return the file that defines a dotted name, which a package may export from a module in it, and its last part.

    Of a module the last part is empty.
    """
    if (file := ROOT.joinpath(*path.split(".")).with_suffix(".py")).exists():
        return file, ""
    *folders, name = path.split(".")
    place = ROOT.joinpath(*folders)
    files = [place.with_suffix(".py")] if place.with_suffix(".py").exists() else sorted(place.rglob("*.py"))
    return next(file for file in files if docstring(file, name)), name


def public(file: Path) -> list[str]:
    """Return the names of the public classes and functions of a module."""
    names = [getattr(node, "name", "_") for node in ast.parse(file.read_text()).body]
    return [name for name in names if not name.startswith("_")]


def docstring(file: Path, *names: str) -> str:
    """Return the docstring of a module, of a name in it (a variable too) or of a method; an empty text without one."""
    node = ast.parse(file.read_text())
    for name in names:
        body = [*getattr(node, "body", []), None]
        for node, after in zip(body, body[1:], strict=False):
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name and isinstance(after, ast.Expr):
                return ast.literal_eval(after.value)
            if getattr(node, "name", None) == name:
                break
        else:
            return ""
    return ast.get_docstring(node) or ""


def assigned(file: Path, name: str) -> ast.expr:
    """Return the value that a module gives to a variable."""
    found = (node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Assign))
    return next(node.value for node in found if ast.unparse(node.targets[0]) == name)


def sentence(text: str) -> str:
    """Return the first sentence of a docstring."""
    return plain(re.split(r"(?<=\.) (?=[A-Z`])", " ".join(text.split("\n\n")[0].split()))[0])


def plain(text: str) -> str:
    """Return a text with code in place of the links of Hugging Face's docstrings."""
    return LINK.sub(r"`\1`", text)


def filled(page: Path, tables: str) -> str:
    """Return the text of a page with these tables between the markers."""
    before, _, rest = page.read_text().partition(MARKERS[0])
    return f"{before}{MARKERS[0]}\n\n{tables}\n\n{MARKERS[1]}{rest.partition(MARKERS[1])[2]}"


def pages() -> dict[Path, str]:
    """Return the text that each page should have."""
    made = {ROOT / "docs/settings.md": settings(), ROOT / "docs/api.md": api()}
    return {page: filled(page, tables) for page, tables in made.items()}


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text)
