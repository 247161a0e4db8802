"""Hooks of mkdocs (mkdocs.yml): pages that the site has and `docs/` does not.

README.md is the home page. SECURITY.md, CONTRIBUTING.md and CHANGELOG.md are pages, and every
registered id has one. A file of the repository that a page links to, such as an example, becomes a
page with its text.
"""

import json
import posixpath
import re
from pathlib import Path

from env_pages import env_pages
from linked import link
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
FROM_ROOT = {
    "README.md": "index.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Files beside `docs/` and the pages that they become."""
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")
"""[text](target#place) with a target that is no URL."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Link the sources where mkdocstrings looks, and name a page for each id."""
    link(ROOT / "build" / "linked")
    names = [f"environments/{name}" for name in env_pages()]
    config.nav = [
        {"Environments": names} if entry == {"Environments": "environments"} else entry
        for entry in config.nav
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    pages = {page: (ROOT / source).read_text("utf-8") for source, page in FROM_ROOT.items()}
    pages |= {f"environments/{name}": text for name, text in env_pages().items()}
    for source in _shown(files):
        page = File.generated(config, _page_of(source), content=_listing(source))
        page.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(page)
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at files beside `docs/` to the pages that these files have become."""
    path = page.file.src_uri
    if path == "index.md":
        page.meta["hide"] = ["navigation"]  # it has nothing beside it
    source = {page: source for source, page in FROM_ROOT.items()}.get(path, f"docs/{path}")
    if path.startswith("source/"):
        source = path.removeprefix("source/").removesuffix(".md")
    return LINK.sub(lambda match: _relinked(match, source, path), markdown)


def _relinked(match: re.Match[str], source: str, page: str) -> str:
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
    if not (ROOT / target).is_file():  # code that looks like a link; mkdocs knows broken links
        return match[0]
    new = posixpath.relpath(_page_of(target), posixpath.dirname(page) or ".")
    return f"{match[1]}{new}{match[3]}"


def _page_of(target: str) -> str:
    """The page, relative to `docs/`, of a file of the repository."""
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return FROM_ROOT.get(target, f"source/{target}.md")


def _shown(files: Files) -> set[str]:
    """The files beside `docs/` that pages link to, except those that are pages anyway."""
    texts = {source: (ROOT / source).read_text("utf-8") for source in FROM_ROOT}
    texts |= {f"docs/{f.src_uri}": f.content_string for f in files.documentation_pages()}
    targets = {
        posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        for source, text in texts.items()
        for match in LINK.finditer(text)
    }
    beside = {t for t in targets if not t.startswith("docs/") and (ROOT / t).is_file()}
    return beside - FROM_ROOT.keys()


def _listing(source: str) -> str:
    path = ROOT / source
    if path.suffix == ".ipynb":
        return f"# {source}\n\n{_notebook(path)}"
    language = {".py": "python", ".toml": "toml", ".yaml": "yaml", ".sh": "bash"}.get(
        path.suffix, ""
    )
    return f"# {source}\n\n````{language}\n{path.read_text('utf-8')}````\n"


def _notebook(path: Path) -> str:
    """A notebook's cells as Markdown, with the outputs left out."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    texts = [("".join(cell["source"]), cell["cell_type"] == "code") for cell in cells]
    return "\n\n".join(f"```python\n{text}\n```" if code else text for text, code in texts)
