"""What the site shows besides the Markdown of docs/: pages of the root, and the files outside docs/ that pages link to.

In the Markdown such a link is a path that leads to the file in a checkout (`../examples/tpgrpo.py`). The site has a page for
each, under source/, so that it is whole without the repository beside it.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


ROOT = Path(__file__).parents[1]
ROOT_PAGES = {"CHANGELOG.md": "CHANGELOG.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "README.md": "overview.md"}
"""By their names at the root those in the site, where a README.md would be taken for the front page."""

LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root, and a page for each path outside docs/ that any page links to."""
    pages = [(f"docs/{file.src_uri}", file.content_string) for file in files.documentation_pages()]
    for name, uri in ROOT_PAGES.items():
        path = ROOT / name
        if path.exists():
            pages.append((name, path.read_text()))
            files.append(File.generated(config, uri, content=path.read_text()))
    for place in sorted({_place(name, link) for name, text in pages for link in LINK.findall(text)}):
        if _is_source(place):
            _add_source(files, config, place)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that leave docs/ to their pages in the site."""
    uri = page.file.src_uri
    of_root = {in_site: name for name, in_site in ROOT_PAGES.items()}
    if uri.startswith("source/"):
        return markdown
    name = of_root.get(uri, f"docs/{uri}")
    markdown = markdown.replace("<details>", '<details markdown="1">')  # or the tables in it stay as they are typed
    return LINK.sub(lambda link: in_site(name, link[1]), markdown)


def in_site(name: str, link: str) -> str:
    """Where in the site a link leads, from its root.

    Args:
        name: Of the page that it is on, from the repository's root.
        link: As it is in the Markdown. What leads nowhere stays as it is, for MkDocs to report.
    """
    place = _place(name, link)
    if place in ROOT_PAGES:
        return ROOT_PAGES[place]
    if place.startswith("docs/"):
        return place.removeprefix("docs/")
    return f"source/{place}.md" if _is_source(place) else link


def _place(name: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), link))


def _is_source(place: str) -> bool:
    is_page = place.startswith("docs/") or place in ROOT_PAGES
    return not is_page and not place.startswith("..") and (ROOT / place).exists()


def _add_source(files: Files, config: MkDocsConfig, place: str) -> None:
    """A page that shows a file, or lists the files of a folder, each with its own page."""
    path, uri = ROOT / place, f"source/{place}.md"
    if files.get_file_from_path(uri) is not None:
        return
    if path.is_dir():
        names = sorted(item.name for item in path.iterdir() if item.is_file())
        text = "\n".join(f"- [{name}]({path.name}/{name}.md)" for name in names)
        for name in names:
            _add_source(files, config, f"{place}/{name}")
    else:
        text = f"````{path.suffix[1:]}\n{path.read_text()}\n````"
    files.append(File.generated(config, uri, content=f"# {place}\n\n{text}\n"))
