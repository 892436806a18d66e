"""The typed stubs of the native modules against the modules as built and the C++ that they describe."""

import ast
import re
from pathlib import Path

import pytest

import l0kernels
from l0kernels._native import native
from l0kernels.impl import cuda

PACKAGE = Path(l0kernels.__file__).parent
BUILT = {"_C": native, "_CUDA": cuda._CUDA}
SOURCES = {"_C": "bindings.cpp", "_CUDA": "cuda/bindings.cpp"}
STUBS = {name: ast.parse((PACKAGE / f"{name}.pyi").read_text()).body for name in BUILT}
FUNCTIONS = [
    (name, node) for name, body in STUBS.items() for node in body if isinstance(node, ast.FunctionDef)
]
each_function = pytest.mark.parametrize(
    ("name", "stub"), FUNCTIONS, ids=[f"{name}.{stub.name}" for name, stub in FUNCTIONS]
)


def built(name):
    if BUILT[name] is None:
        pytest.skip(f"l0kernels.{name} was not built")
    return BUILT[name]


def numbers(annotation, aliases=()):
    """The kinds of numbers in a type from left to right, however pybind11's version spells it."""
    found = []
    for word in re.findall(r"\w+", annotation.replace("SupportsIndex", "")):
        word = {"SupportsInt": "int", "SupportsFloat": "float"}.get(word, word)
        if word in ("int", "float", "bool", "str"):
            found.append(word)
        elif word in aliases:
            found += numbers(aliases[word], aliases)
    return found


@pytest.mark.parametrize("name", BUILT)
def test_every_name_is_declared(name):
    declared = {stub.name for module, stub in FUNCTIONS if module == name}
    declared |= {node.target.id for node in STUBS[name] if isinstance(node, ast.AnnAssign) and not node.value}
    declared |= {node.name for node in STUBS[name] if isinstance(node, ast.ClassDef)}
    assert declared == {key for key in vars(built(name)) if not key.startswith(("__", "emulator_"))}


@each_function
def test_parameters_are_those_of_the_module(name, stub):
    aliases = {
        node.target.id: ast.unparse(node.value)
        for node in STUBS[name]
        if isinstance(node, ast.AnnAssign) and node.value
    }
    signature = getattr(built(name), stub.name).__doc__.splitlines()[0]
    parameters, result = re.fullmatch(rf"{stub.name}\((.*)\) -> (.*)", signature).groups()
    types = re.split(r"(?:^|, )arg\d+: ", parameters)[1:]
    expected = [numbers(ast.unparse(parameter.annotation), aliases) for parameter in stub.args.posonlyargs]
    assert [numbers(kind) for kind in types] == expected
    assert numbers(result) == numbers(ast.unparse(stub.returns), aliases)


@pytest.mark.parametrize("name", BUILT)
def test_methods_take_as_many_arguments_as_those_of_the_module(name):
    for stub in STUBS[name]:
        for method in stub.body if isinstance(stub, ast.ClassDef) else []:
            doc = getattr(getattr(built(name), stub.name), method.name).__doc__.splitlines()[0]
            assert len(re.findall(r"\barg\d+: ", doc)) == len(method.args.posonlyargs) - 1, method.name


@each_function
def test_names_are_those_of_the_source(name, stub):
    source = PACKAGE.parent / "csrc" / SOURCES[name]
    if not source.exists():
        pytest.skip("csrc is not beside the package")
    found = re.search(rf"^[\w:<>, ]+ {stub.name}\((.*?)\) {{", source.read_text(), re.MULTILINE | re.DOTALL)
    if found is None:
        text = source.read_text()  # of another file, or by Python's own interface
        assert f'm.def("{stub.name}", &' in text or f'{{"{stub.name}", reinterpret_cast<PyCFunction>' in text
        return
    names = re.findall(r"(\w+)(?:,(?![^<]*>)|$)", found[1])
    assert [parameter.arg.rstrip("_") for parameter in stub.args.posonlyargs] == names
