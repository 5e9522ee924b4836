"""What MkDocs asks while it builds the site: the site's tree is the repository's, with docs/ at its root.

So README.md is the first page, and whatever a page links to outside docs/ (measured results, scripts, other pages) is
part of the site. Pages keep links that hold in the repository; here they are made to hold in the site.

For mkdocstrings, the sections `Example:` of docstrings become what it shows as code.
"""

import re
from pathlib import Path
from posixpath import dirname, relpath
from typing import Any

from griffe import Extension, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_LINK = re.compile(r"(\[(?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*\])\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the pages of the menu and of docs/ link to, and what those pages link to."""
    root = Path(config.config_file_path).parent
    waiting = [*_named(config.nav), *(f"docs/{page.src_uri}" for page in files.documentation_pages())]
    while waiting:
        name = waiting.pop()
        path = root / name
        if not name.startswith("docs/") and path.is_file() and files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(path)))
        elif not name.startswith("docs/"):
            continue  # a folder, one that is missing, or one that was here before
        if name.endswith(".md") and path.is_file():
            targets = (_target(name, link[2]) for link in _LINK.finditer(path.read_text(encoding="utf-8")))
            waiting += [target for target in targets if not target.startswith("docs/")]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Turn links from where a page lies in the repository into links from where it lies in the site."""
    root = Path(config.config_file_path).parent
    name = Path(str(page.file.abs_src_path)).relative_to(root).as_posix()

    def moved(link: re.Match[str]) -> str:
        target = _target(name, link[2])
        if (root / target).is_dir():
            return link[1][1:-1]  # no page shows a folder
        place = relpath(target.removeprefix("docs/"), dirname(page.file.src_uri) or ".")
        return f"{link[1]}({place}{link[3] or ''})"

    return _LINK.sub(moved, markdown)


def _target(name: str, link: str) -> str:
    """A link's target as a path from the repository's root."""
    return relpath(f"{dirname(name)}/{link}" if dirname(name) else link)


def _named(menu: Any) -> list[str]:
    """The pages of the menu that lie outside docs/, or might."""
    if isinstance(menu, dict):
        return [name for part in menu.values() for name in _named(part)]
    return [menu] if isinstance(menu, str) else [name for part in menu for name in _named(part)]


class Examples(Extension):
    """Tells Griffe, which calls these sections `Examples`, what an `Example` is."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """See `griffe.Extension`."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
