"""Of mkdocs: the pictures of bench/results are files of the site, and links to them work in the repository.

What the conversion of docstrings has left as it was is a warning, which a strict build ends with.
"""

import logging
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
LEFT = re.compile(r":(?:class|func|meth|attr|mod):|::\s*</p>|={6}")

log = logging.getLogger("mkdocs.hooks.l0kernels")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pictures as results/NAME."""
    for path in sorted(RESULTS.glob("*.svg")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Has pages at the top of docs/ find them there."""
    return markdown.replace("](../bench/results/", "](results/")


def on_page_content(html: str, page: Page, **_: Any) -> None:
    """Looks for reStructuredText in what was made of docstrings."""
    for found in LEFT.finditer(html):
        around = html[max(0, found.start() - 60) : found.end() + 60]
        log.warning("%s: reStructuredText in a docstring: %r", page.file.src_path, around)
