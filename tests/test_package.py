"""The package's face: light to import, and everything it promises is there."""

import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import everlong

ROOT = Path(__file__).parents[1]


def test_importing_it_does_not_import_pytorch():
    script = "import sys, everlong; sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


@pytest.mark.parametrize("name", everlong.__all__)
def test_every_public_name_is_there(name):
    assert getattr(everlong, name) is not None
    assert name in dir(everlong)


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        everlong.nonsense  # noqa: B018


def test_the_version_is_that_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert everlong.__version__ == project["version"]
    try:
        assert version("everlong") == project["version"]
    except PackageNotFoundError:
        pytest.skip("everlong is not installed here")


def test_types_are_published():
    assert (ROOT / "src" / "everlong" / "py.typed").is_file()
