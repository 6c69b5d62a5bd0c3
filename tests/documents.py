"""The pages of the documentation, and what the tests read from them: blocks of code, commands, links and anchors."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.commands.launch import launch_command_parser

from trl_tpgrpo.commands.plan import PlannedConfig
from trl_tpgrpo.commands.train import make_parser, split_options


ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*(path for name in ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY") for path in ROOT.glob(f"{name}.md"))]
    + [*ROOT.glob("docs/*.md")]
)
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block, or a command within a sentence.

    Attributes:
        page: The file.
        line: Of its first line in the file.
        language: `"python"`, `"bash"` and so on; `""` for output and the like.
        text: Without the fence and its indentation.
    """

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of these languages, from top to bottom."""
    text = page.read_text()
    found = []
    for match in FENCE.finditer(text):
        code = re.sub(f"^{match[1]}", "", match[3], flags=re.MULTILINE)
        found.append(Block(page, text[: match.start()].count("\n") + 2, match[2], code))
    return [block for block in found if block.language in languages]


def prose(page: Path) -> str:
    """The page with its fenced blocks left empty, line for line."""
    return FENCE.sub(lambda match: "\n" * match[0].count("\n"), page.read_text())


def inline_code(page: Path) -> list[Block]:
    """What stands between backticks in sentences and tables."""
    text = prose(page)
    return [Block(page, text[: match.start()].count("\n") + 1, "", match[1]) for match in INLINE.finditer(text)]


def links(page: Path) -> list[str]:
    """The targets of links and images to other files and to headings, not to other sites."""
    targets = LINK.findall(INLINE.sub("", prose(page)))
    return [target for target in targets if not re.match(r"https?:|mailto:", target)]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them, and of the API's names."""
    text = prose(page)
    found: set[str] = set()
    for heading in HEADING.findall(text):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")
        number = 0
        while f"{slug}-{number}" in found or (number == 0 and slug in found):
            number += 1
        found.add(f"{slug}-{number}" if number else slug)
    return found | set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


def read_training(options: list[str], own_types: tuple[type, ...] = ()) -> tuple[Any, ...]:
    """The options and recipes of a training as `trl-tpgrpo` reads them.

    A training that needs a GPU is read too: none is asked for.

    Args:
        options: Of the command line.
        own_types: Dataclasses of the command's own options, which come first in what is returned.

    Raises:
        ValueError, SystemExit: If one does not exist, or its value is none that it may have.
    """
    parser = make_parser(own_types=own_types)
    launch_options, own_options = split_options(parser, options)
    launch = launch_command_parser().parse_args([*launch_options, "script"])
    assert launch.config_file is None or Path(launch.config_file).exists()
    parser.dataclass_types[-1] = PlannedConfig
    parser.set_defaults(num_processes=1)
    return parser.parse_args_and_config(own_options, fail_with_unknown_args=False)
