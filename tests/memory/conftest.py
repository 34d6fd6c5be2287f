"""A store, empty or with one memory."""

import pytest

from everlong.memory.store import MemoryStore
from tests.memory.adapters import PAIRS, lora, record


@pytest.fixture
def store(tmp_path):
    return MemoryStore(tmp_path / "memories")


@pytest.fixture
def kept(store):
    """A store with one memory, 'handbook'."""
    store.add(record(), lora(), PAIRS)
    return store
