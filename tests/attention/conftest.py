"""What tests of compiled kernels share."""

import pytest
import torch

from everlong.attention import parts


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def counted(monkeypatch):
    """Return what has a kernel's calls counted: a list, of the number of parts each time."""

    def count(name):
        seen, kernel = [], getattr(parts, name)

        def noted(some, scaling):
            seen.append(len(some))
            return kernel(some, scaling)

        monkeypatch.setattr(parts, name, noted)
        return seen

    return count
