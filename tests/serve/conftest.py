import pytest
from helpers.serving import serving


@pytest.fixture(scope="session")
def server():
    """One server of the bundled model for all tests that leave it as it was."""
    with serving() as served:
        yield served
