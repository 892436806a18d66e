"""Of mkdocs: pictures of bench/results are files of the site, and links to them work in the repository, too."""

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pictures as results/NAME."""
    for path in sorted(RESULTS.glob("*.svg")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Has pages at the top of docs/ find them there."""
    return markdown.replace("](../bench/results/", "](results/")
