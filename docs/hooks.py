"""What the site (mkdocs.yml) needs beyond docs/*.md, so that pages read alike here and on a code host.

Links of a page lead out of docs/ as they do on a code host (`../configs/ctr-sink.yaml`). What they lead to is brought into the
site under `repository/`: Markdown as a page, another file as a page that shows it, a folder as a list of its files. README.md is
the home page.
"""

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
HOME = ROOT / "README.md"
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")
FENCE = re.compile(r"^```(\S*)[^\n]*\n.*?^```$", re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> None:
    """Headings get the addresses that a code host gives them."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Bring in the home page, and whatever pages link to outside of docs/."""
    waiting, known = [HOME, *(Path(f.abs_src_path or "") for f in files.documentation_pages())], set[Path]()
    while waiting:
        target = waiting.pop()
        if target in known or not target.exists():
            continue  # a link to nothing is left as it is, and the strict build says so
        known.add(target)
        if not target.is_relative_to(DOCS):
            files.append(File.generated(config, uri(target), content=_shown(target)))
        if target.suffix == ".md":
            waiting += (linked for linked in _linked(target))
        elif target.is_dir():
            waiting += _listed(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of the repository into those of the site; what stands behind a block's language is not for readers."""
    here = page.file.src_uri
    source = HOME if here == "index.md" else ROOT / here.removeprefix("repository/") if _brought(here) else DOCS / here

    def moved(link: re.Match[str]) -> str:
        target = Path(os.path.normpath(source.parent / link[1]))
        return posixpath.relpath(uri(target), posixpath.dirname(here) or ".") if target.exists() else link[1]

    parts, end = [], 0
    for block in FENCE.finditer(markdown):
        code = block[0].split("\n", 1)[1]
        parts += [LINK.sub(moved, markdown[end : block.start()]), f"```{block[1]}\n{code}"]
        end = block.end()
    return "".join([*parts, LINK.sub(moved, markdown[end:])])


def uri(target: Path) -> str:
    """Where a file or folder of the repository is in the site, as a page's source."""
    if target == HOME:
        return "index.md"
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    name = f"repository/{target.relative_to(ROOT).as_posix()}"
    return f"{name}/index.md" if target.is_dir() else name if target.suffix == ".md" else f"{name}.md"


def _brought(here: str) -> bool:
    return here.startswith("repository/")


def _linked(page: Path) -> Iterator[Path]:
    for link in LINK.finditer(FENCE.sub("", page.read_text("utf-8"))):
        yield Path(os.path.normpath(page.parent / link[1]))


def _listed(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))


def _shown(target: Path) -> str:
    """The Markdown of a page that shows a file or a folder."""
    if target.suffix == ".md":
        return target.read_text("utf-8")
    title = f"# `{target.relative_to(ROOT).as_posix()}`\n\n"
    if target.is_dir():
        return title + "\n".join(f"- [{file.name}]({file.name})" for file in _listed(target))
    language = {".py": "python", ".yaml": "yaml", ".json": "json"}.get(target.suffix, "text")
    return f"{title}```{language}\n{target.read_text('utf-8').rstrip()}\n```\n"
