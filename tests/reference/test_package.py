import ast
import sys
from functools import cache
from pathlib import Path

import pytest

import l0kernels
from l0kernels import nn, reference


def test_exports_exist_and_are_documented():
    assert sorted(reference.__all__) == reference.__all__
    for name in reference.__all__:
        if name != "ALIGN":
            assert getattr(reference, name).__doc__


PACKAGE = Path(reference.__file__).parent.parent
FLOOR = ("_compat", "_checks", "_gates", "_calls", "_arguments", "_native")
"""What everything else stands on, the lowest first."""


@cache
def parsed(file):
    return ast.parse(file.read_text())


def imports(file):
    """(module, names) of every import in a file, within the package from its root."""
    folder = file.relative_to(PACKAGE).parent.parts
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            root = ("l0kernels", *folder)[: len(folder) + 2 - node.level] if node.level else ()
            module = ".".join((*root, *filter(None, [node.module])))
            if module == "l0kernels":
                yield from ((f"l0kernels.{name}", ()) for name in names)
            else:
                yield module, names


def own(file):
    """What of the package a file imports; all else must be torch or Python."""
    for module, _ in imports(file):
        root, *rest = module.split(".")
        if root == "l0kernels":
            yield rest[0]
        else:
            assert root in {"torch", *sys.stdlib_module_names}, (file, module)


@pytest.mark.parametrize("name", FLOOR)
def test_the_floor_stands_on_torch_alone(name):
    below = FLOOR[: FLOOR.index(name)]
    assert set(own(PACKAGE / f"{name}.py")) <= set(below)


def test_the_reference_stands_on_the_floor():
    files = list((PACKAGE / "reference").glob("*.py"))
    assert len(files) > 5
    for file in files:
        assert set(own(file)) <= {*FLOOR, "reference"}, file.name


TAKEN = {"torch.py": ["sample_zs"], "portable.py": ["sample_z"]}


def test_only_formulas_are_taken_from_the_reference():
    for file in PACKAGE.rglob("*.py"):
        if file.parent.name != "reference" and "triton_kernels" not in file.parts:
            for module, names in imports(file):
                if module.startswith("l0kernels.reference") and names:
                    assert names == TAKEN.get(file.name), file.name


KNOWN = {*l0kernels.__all__, *nn.__all__, *reference.__all__}


def test_no_function_has_more_than_12_parameters():
    """A record says it better; Triton's kernels take none, and signatures that users know stay."""
    for file in (*PACKAGE.rglob("*.py"), *(PACKAGE / "triton_kernels").glob("*.py")):
        tree = parsed(file)
        public = {n for node in tree.body if getattr(node, "name", None) in KNOWN for n in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node not in public:
                of_triton = any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
                of_module = file.parent.name == "nn" and node.name == "__init__"  # public classes inherit it
                given = node.args
                names = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
                assert of_triton or of_module or len([*filter(None, names)]) <= 12, (file.name, node.name)
