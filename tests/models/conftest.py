import pytest


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for the whole world of packages."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch, request):
    """A home of its own for every test, except those that use the real models."""
    if "model" in request.keywords:
        return None
    folder = tmp_path / "home"
    monkeypatch.setenv("EVERLONG_HOME", str(folder))
    return folder
