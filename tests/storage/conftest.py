import gc
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from dagflow_storage import Store
from dagflow_storage.faults import FakeClock


@pytest.fixture(autouse=True, scope="module")
def _clients_are_not_looked_at_again() -> Iterator[None]:
    """fsspec keeps every client of S3 for ever, and each has read S3's description: 27,000 objects."""
    yield
    if "s3fs" in sys.modules:
        gc.collect()
        gc.freeze()


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"), clock=FakeClock())


@pytest.fixture
def memory() -> Iterator[Store]:
    root = Store("memory://", clock=FakeClock())
    name = f"test-{uuid.uuid4().hex}"
    yield root.child(name)
    root.delete(name)


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest) -> Store:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Store)
    return found
