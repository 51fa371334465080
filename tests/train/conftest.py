import pytest

from llava_cot import tiny_path
from tools.small_world.search_data import write_search_data


@pytest.fixture(scope="session")
def search_data(tmp_path_factory):
    """A folder with eight traces of the bundled model, and their preference pairs and steps."""
    folder = tmp_path_factory.mktemp("search")
    counts = write_search_data(folder, range(300_000, 300_008), tiny_path())
    assert counts["traces"] == 8 and counts["preferences"] >= 8 and counts["steps"] >= 16
    return folder
