"""README and the manual: links lead somewhere, commands and paths exist, what is generated is up to date."""

import re
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location

import pytest
from manual import PAGES, ROOT, blocks, prose

import l0kernels as l0

LINK = re.compile(r"(?<!\\)\[[^\]]*\]\(([^)\s]+)[^)]*\)|(?:src|href)=\"([^\"]+)\"")
FOLDERS = "bench|csrc|docs|examples|l0kernels|tests|triton_kernels"
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))
CODE = re.compile(r"`([^`\n]+)`")
LANGUAGES = {"python", "sh", "text", "make"}


def slugs(text):
    """The anchors of a page's headings, as Python-Markdown and GitHub make them."""
    found = []
    for heading in re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE):
        plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        found.append(re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return found


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    text = PAGES[name].read_text()
    for found in LINK.finditer(prose(text)):
        target = found[1] or found[2]
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        page = (PAGES[name].parent / path).resolve() if path else PAGES[name]
        assert page.exists(), f"{target}: no such file"
        if anchor and not anchor.startswith("l0kernels"):  # those of the API are mkdocs' to check
            assert anchor in slugs(page.read_text()), f"{target}: no such heading"


@pytest.mark.parametrize("name", PAGES)
def test_commands_exist(name):
    text = PAGES[name].read_text()
    lines = [line for block in blocks(text) if block.language == "sh" for line in block.source.split("\n")]
    lines += CODE.findall(prose(text))
    for line in lines:
        for target in re.findall(r"(?:^|&& )make ([a-z][\w-]*)", line):
            assert target in TARGETS, f"make {target}: no such target"
        for script in re.findall(r"(?:^|\s)(?:python|torchrun) (?:--\S+ )*(\S+\.py)", line):
            assert (ROOT / script).exists() or "/" not in script, f"{script}: no such file"


@pytest.mark.parametrize("name", [name for name in PAGES if name != "README.md"])
def test_paths_and_names_exist(name):
    """Those in code: files of the repository, and names of the package."""
    text = PAGES[name].read_text()
    for code in CODE.findall(prose(text)):
        for path in re.findall(rf"(?<![\w/.])(?:{FOLDERS})/[\w./-]*\w(?![\w*])", code):
            assert (ROOT / path).exists(), f"{path}: no such file"
        for dotted in re.findall(r"\bl0((?:\.[A-Za-z_]\w*)+)", code):
            value = l0
            for part in dotted.split(".")[1:]:
                assert hasattr(value, part), f"l0{dotted}: no such name"
                value = getattr(value, part)


@pytest.mark.parametrize("name", PAGES)
def test_every_block_is_read(name):
    """None is of a language, or written in a way, that no test looks at."""
    text = PAGES[name].read_text()
    found = {block.language for block in blocks(text)}
    assert len(re.findall(r"^ *(?:```|~~~)", text, re.MULTILINE)) == 2 * len(blocks(text))
    assert found <= LANGUAGES | ({""} if name == "README.md" else set())


def entries(*names):
    """The public names that the API's pages have entries of; of some the module's name, and theirs, stand."""
    text = "\n".join(PAGES[f"docs/api/{name}.md"].read_text() for name in names)
    found = [re.sub(r"\.(\w+)\.\1$", r".\1", name) for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)]
    assert len(found) == len(set(found))
    return set(found)


def test_every_public_name_has_an_entry():
    packages = ("nn", "prox", "hf")
    import_module("l0kernels.hf")
    names = {f"l0kernels.{name}" for name in {*l0.__all__} - {*packages, "reference"}}
    names |= {f"l0kernels.{package}.{name}" for package in packages for name in getattr(l0, package).__all__}
    assert entries("functions", *packages) == names


def test_every_reference_has_an_entry():
    elsewhere = {"ALIGN", "Gates", "HardConcrete"}
    names = {f"l0kernels.reference.{name}" for name in set(l0.reference.__all__) - elsewhere}
    assert entries("reference") == names


@pytest.mark.parametrize("script", ["tables", "pictures"])
def test_what_scripts_write_is_as_they_write_it(script, capsys):
    spec = spec_from_file_location(f"docs_{script}", ROOT / "docs" / "scripts" / f"{script}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(["--check"]) == 0, capsys.readouterr().err


def test_readme_is_read_in_two_minutes():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert len(text.split()) <= 1200
