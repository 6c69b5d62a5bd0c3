"""Pages of the site besides the Markdown of docs/: those of the root, and the files outside docs/ that pages link to.

In the Markdown such a link is a path to the file in a checkout (`../examples/tpgrpo.py`). The site has a page for each
file, under source/, so that the site is whole without the repository beside it.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


ROOT = Path(__file__).parents[1]
ROOT_PAGES = {"README.md": "overview.md"} | {name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")}
"""Name at the root -> name in the site, where a README.md would be taken for the front page."""

LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root, and a page for each path outside docs/ that any page links to."""
    pages = [(f"docs/{file.src_uri}", file.content_string) for file in files.documentation_pages()]
    for name, uri in ROOT_PAGES.items():
        path = ROOT / name
        if path.exists():
            pages.append((name, path.read_text()))
            files.append(File.generated(config, uri, content=path.read_text()))
    for target in sorted({_target(name, link) for name, text in pages for link in LINK.findall(text)}):
        if _is_source(target):
            _add_source(files, config, target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that leave docs/ to their pages in the site."""
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown
    name = next((name for name, page_uri in ROOT_PAGES.items() if page_uri == uri), f"docs/{uri}")
    markdown = markdown.replace("<details>", '<details markdown="1">')  # or the tables in it stay as they are typed
    return LINK.sub(lambda link: in_site(name, link[1]), markdown)


def in_site(name: str, link: str) -> str:
    """Return the path in the site, from its root, that a link of the Markdown leads to.

    Args:
        name: Path of the page with the link, from the repository's root.
        link: Link as it is in the Markdown. A link that leads nowhere is returned as it is, for MkDocs to report.
    """
    target = _target(name, link)
    if target in ROOT_PAGES:
        return ROOT_PAGES[target]
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return f"source/{target}.md" if _is_source(target) else link


def _target(name: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), link))


def _is_source(target: str) -> bool:
    is_page = target.startswith("docs/") or target in ROOT_PAGES
    return not is_page and not target.startswith("..") and (ROOT / target).exists()


def _add_source(files: Files, config: MkDocsConfig, target: str) -> None:
    """Add a page that shows a file, or that lists the files of a folder, each with a page too."""
    path, uri = ROOT / target, f"source/{target}.md"
    if files.get_file_from_path(uri) is not None:
        return
    if path.is_dir():
        names = sorted(item.name for item in path.iterdir() if item.is_file())
        text = "\n".join(f"- [{name}]({path.name}/{name}.md)" for name in names)
        for name in names:
            _add_source(files, config, f"{target}/{name}")
    else:
        text = f"````{path.suffix[1:]}\n{path.read_text()}\n````"
    files.append(File.generated(config, uri, content=f"# {target}\n\n{text}\n"))
