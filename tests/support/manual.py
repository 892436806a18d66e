"""README and the manual as their tests read them: pages, and the fenced blocks in them."""

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    str(page.relative_to(ROOT)): page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}

FENCE = re.compile(r"^( *)```(\w*)([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block; `line` is that of its source's first line, `info` what stands behind the language."""

    language: str
    info: str
    source: str
    line: int


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page, without the indentation that lists and notes give them."""
    found = []
    for fence in FENCE.finditer(text):
        line = text.count("\n", 0, fence.start()) + 2
        found.append(Block(fence[2], fence[3].strip(), textwrap.dedent(fence[4]), line))
    return found


def prose(text: str) -> str:
    """A page without its fenced blocks, whose lines stay, empty."""
    return FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text)


def meta(text: str) -> dict[str, str]:
    """The lines ``key: value`` between two ``---`` at the top of a page."""
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    lines = found[1].split("\n") if found else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
