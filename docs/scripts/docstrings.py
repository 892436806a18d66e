"""Of mkdocstrings: docstrings are written for people who read the source, and become Markdown here.

``:class:`GateBank` `` becomes a link, the block behind ``::`` one of code, a table of ``====`` rules one of
text. The files stay as they are.
"""

import ast
import re
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parents[2]
ROLE = re.compile(r":(?:class|func|meth|attr|mod):`~?([\w.]+)`")
RULE = re.compile(r"\s*=+(  +=+)+")
CODE = re.compile(r"(``.+?``|`[^`]+`)", re.DOTALL)


@cache
def public(package: str) -> frozenset[str]:
    """The names in ``__all__`` of l0kernels, l0kernels.nn or l0kernels.prox."""
    source = (ROOT / package.replace(".", "/") / "__init__.py").read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return frozenset(ast.literal_eval(node.value))
    raise ValueError(f"{package} has no __all__")


def path_of(package: str, name: str) -> str:
    """The entry of a public name: a module of the same name hides it from who only reads the sources."""
    hidden = (ROOT / package.replace(".", "/") / f"{name}.py").exists()
    return f"{package}.{name}.{name}" if hidden else f"{package}.{name}"


def linked(role: re.Match[str]) -> str:
    """A link to the public name of a role; to its class for what is in a class."""
    text = role[1].removeprefix("l0kernels.nn.").removeprefix("l0kernels.prox.").removeprefix("l0kernels.")
    first = text.split(".")[0]
    for package in ("l0kernels.nn", "l0kernels", "l0kernels.prox"):
        if first in public(package):
            return f"[`{text}`][{path_of(package, first)}]"
    return f"`{text}`"


def prose(text: str) -> str:
    """A paragraph: roles are links, and a power is no emphasis."""
    parts = CODE.split(ROLE.sub(linked, text))
    parts[::2] = [re.sub(r"(?<=\w)\*\*(?=\w)", r"\\*\\*", part) for part in parts[::2]]
    return "".join(parts)


def indent_of(line: str) -> int:
    return len(line) - len(line.lstrip())


def block_behind(lines: list[str], start: int, indent: int) -> int:
    """Where the lines end that are blank or deeper than `indent`."""
    end = start
    while end < len(lines) and (not lines[end].strip() or indent_of(lines[end]) > indent):
        end += 1
    return end


def fenced(lines: list[str], indent: int, language: str) -> list[str]:
    code = textwrap.dedent("\n".join(lines)).strip("\n").split("\n")
    return [" " * indent + line if line else "" for line in ["", f"```{language}", *code, "```", ""]]


def markdown(docstring: str) -> str:
    """The docstring with its blocks of code and tables in fences, and links for roles."""
    lines = docstring.split("\n")
    made: list[str] = []
    paragraph: list[str] = []

    def flush() -> None:
        if paragraph:
            made.extend(prose("\n".join(paragraph)).split("\n"))
            paragraph.clear()

    at = 0
    while at < len(lines):
        line = lines[at]
        indent = indent_of(line)
        if RULE.fullmatch(line):
            flush()
            rules = [i for i in range(at, len(lines)) if RULE.fullmatch(lines[i])][:3]
            rows = [
                row.replace("``", "  ").replace("=", "-" if RULE.fullmatch(row) else "=")
                for row in lines[at + 1 : rules[-1]]
            ]
            made += fenced(rows, indent, "text")
            at = rules[-1] + 1
        elif line.rstrip().endswith("::"):
            end = block_behind(lines, at + 1, indent)
            if line.strip() != "::":
                paragraph.append(line.rstrip()[:-1])
            flush()
            made += fenced(lines[at + 1 : end], indent, "python")
            at = end
        else:
            if not line.strip():
                flush()
                made.append(line)
            else:
                paragraph.append(line)
            at += 1
    flush()
    return "\n".join(made)


class Docstrings(griffe.Extension):
    """Has mkdocstrings render :func:`markdown` of every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
