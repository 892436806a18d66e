"""The files around the code that others read: the changelog, how to cite, what a public CI runs."""

import re
from pathlib import Path

import pytest
import yaml

import l0kernels

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()


def test_the_changelog_has_the_version_newest_first():
    versions = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert l0kernels.__version__ in versions
    numbers = [tuple(map(int, version.split("."))) for version in versions if version != "Unreleased"]
    assert numbers == sorted(numbers, reverse=True)
    assert versions.index("Unreleased") == 0


def test_the_version_stands_in_one_place():
    said = re.compile(rf"version\W+{re.escape(l0kernels.__version__)}\b")
    files = ["pyproject.toml", "setup.py", "CITATION.cff", "README.md", "Makefile"]
    assert [name for name in files if said.search((ROOT / name).read_text())] == []


def test_citation():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(cff)  # what the format requires
    assert cff["cff-version"] == "1.2.0"
    assert cff["type"] == "software"
    assert cff["license"] == "MIT"
    people = [*cff["authors"], *(author for source in cff["references"] for author in source["authors"])]
    assert all("name" in person or {"family-names", "given-names"} <= set(person) for person in people)
    assert all({"type", "title", "authors"} <= set(source) for source in cff["references"])


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda path: path.name
)
def test_workflow(path):
    text = path.read_text()
    workflow = yaml.safe_load(text)
    assert {"name", "jobs"} <= set(workflow)
    assert True in workflow  # `on`, as YAML 1.1 reads it
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, re.M))
    for job in workflow["jobs"].values():
        assert "runs-on" in job
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])
        for step in job["steps"]:
            assert re.fullmatch(r"[\w-]+/[\w-]+@v[\d.]+", step.get("uses", "a/b@v1"))
            command = step.get("run", "")
            assert set(re.findall(r"\bmake ([\w-]+)", command)) <= targets | {"docs"}
            for script in re.findall(r"\S+\.py", command):
                assert (ROOT / script).is_file(), script


@pytest.mark.xdist_group("one")
def test_tests_of_a_group_go_to_one_worker(request):
    """What they share is made once. pytest-xdist tells them by names, if pytest lets it change these."""
    if getattr(request.config.option, "loadgroup", False):  # in a worker
        assert request.node.nodeid.endswith("@one")
