"""Tables between the markers of documents: written there, or compared with what stands there."""

import re
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = {
    "README.md": ("nets",),
    "docs/benchmarks.md": ("cpu", "cpu-ms", "gpu", "gpu-ms", "paper", "wrn"),
    "docs/guides/any-model.md": ("zoo", "zoo-steps"),
    "docs/guides/proximal.md": ("proximal", "proximal-steps", "proximal-operators"),
}
"""Who shows tables, and which of them it must."""
BEGIN, END = "<!-- table: {} -->", "<!-- end -->"
_PLACE = re.compile(r"^<!-- table: (\S+) -->\n(.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)


def line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def header(*cells: str) -> list[str]:
    return [line(*cells), "|" + "---|" * len(cells)]


def places(text: str) -> dict[str, str]:
    """What stands between each pair of markers.

    Raises:
        ValueError: a marker without its other one, or a name twice.
    """
    found = _PLACE.findall(text)
    begins = len(re.findall(r"^<!-- table:", text, re.MULTILINE))
    ends = len(re.findall(r"^<!-- end -->", text, re.MULTILINE))
    names = [name for name, _ in found]
    if not len(found) == begins == ends or len(set(names)) != len(names):
        form = f"{BEGIN.format('NAME')} and {END}"
        raise ValueError(f"expected lines {form} in turn, each name once, got {begins} and {ends}: {names}")
    return dict(found)


def filled(text: str, tables: Mapping[str, str], needed: tuple[str, ...]) -> tuple[str, list[str]]:
    """The text with every table in its place, and the names of those that change.

    Raises:
        ValueError: markers that do not pair, that name no table, or one of `needed` that is missing.
    """
    old = places(text)
    unknown = [name for name in old if not tables.get(name)]
    if unknown:
        raise ValueError(f"expected tables of {[name for name in tables if tables[name]]}, got {unknown}")
    missing = [name for name in needed if name not in old]
    if missing:
        raise ValueError(f"expected a place for the table {missing[0]}: {BEGIN.format(missing[0])}, {END}")
    changed = [name for name, body in old.items() if body != _body(tables[name])]
    new = _PLACE.sub(lambda place: f"{BEGIN.format(place[1])}\n{_body(tables[place[1]])}{END}", text)
    return new, changed


def _body(table: str) -> str:
    return f"{table}\n"


def main(tables: Mapping[str, str], write: bool, root: Path = ROOT) -> int:
    """Writes the tables into the documents that exist, or says which of them are not what the results give.

    Returns:
        1 if one is not, and was not written; else 0.

    Raises:
        ValueError: a document whose markers are wrong.
    """
    stale = False
    for name, needed in DOCUMENTS.items():
        path = root / name
        if not path.is_file():
            continue
        text = path.read_text()
        try:
            new, changed = filled(text, tables, needed)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if write and changed:
            path.write_text(new)
        for table in changed:
            told = "written" if write else "not what the results give: run `python bench/table.py --write`"
            print(f"{name}: table {table}: {told}")
        stale |= bool(changed) and not write
        if not changed:
            print(f"{name}: as the results give it")
    return int(stale)
