"""A room imports only what stands below it, and the documentation names every room."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "everlong"
ORDER = [
    *(
        "cli",
        "serving",
        "scaling",
        "evaluation",
        "llm",
        "memory",
        "reading",
        "attention",
        "models",
        "kernels",
    ),
    *("registry", "errors"),
]
FILES = sorted(SOURCE.rglob("*.py"))


def room_of(path):
    inside = path.relative_to(SOURCE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            names = [node.module]
            if node.module == "everlong":
                names = [f"everlong.{alias.name}" for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("everlong."))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_room_imports_only_what_stands_below_it(path):
    room = room_of(path)
    if room in ("__init__", "__main__"):  # the package's face looks everywhere, lazily
        return
    assert room in ORDER, f"{path} stands in no room of the design"
    allowed = {room, *ORDER[ORDER.index(room) + 1 :], "__version__"}
    assert set(imported_rooms(path)) <= allowed


def test_the_architecture_page_names_every_room():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rooms = {room_of(path) for path in FILES} - {"__init__", "__main__"}
    assert not [room for room in rooms if f"`{room}`" not in page and f"`{room}.py`" not in page]


def test_no_file_grows_past_four_hundred_lines():
    assert not [path for path in FILES if len(path.read_text().splitlines()) > 400]
