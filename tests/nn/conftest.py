"""Fixtures of the tests of modules."""

from pathlib import Path

import pytest
import two_ranks


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What became of the checks of two ranks, whose tests lie in several files: one pair runs all of them."""
    return two_ranks.run(tmp_path_factory.mktemp("ranks"), Path(__file__).parent)
