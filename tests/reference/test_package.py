import ast
import sys
from pathlib import Path

from l0kernels import reference


def test_exports_exist_and_are_documented():
    assert sorted(reference.__all__) == reference.__all__
    for name in reference.__all__:
        if name != "ALIGN":
            assert getattr(reference, name).__doc__


def test_imports_torch_and_the_standard_library_only():
    files = list(Path(reference.__file__).parent.glob("*.py"))
    assert len(files) > 5
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                roots = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{file.name} reaches beyond the reference"
                roots = set() if node.level else {(node.module or "").split(".")[0]}
            else:
                continue
            assert roots <= {"torch", *sys.stdlib_module_names}, file.name
