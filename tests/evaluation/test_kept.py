"""Rows of a measurement survive its interruption, in a file that is whole at any time."""

import json

import pytest

from everlong.errors import ConfigurationError, InputError
from everlong.evaluation import kept as kept_module
from everlong.evaluation.kept import KeptRows

SETTING = {"model": "tiny", "dtype": "float32"}


def test_rows_are_there_again(tmp_path):
    path = tmp_path / "new" / "rows.json"
    rows = KeptRows(path, SETTING)
    assert "a" not in rows and not path.exists()
    rows.add("a", {"told": 0.5})
    rows.add("b", {"told": "ä"})
    again = KeptRows(path, SETTING)
    assert again.rows == {"a": {"told": 0.5}, "b": {"told": "ä"}} and "a" in again
    assert [file.name for file in path.parent.iterdir()] == ["rows.json"]


def test_all_machines_are_named_that_rows_are_from(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    for key, cpu in (("a", "first"), ("b", "second"), ("c", "second"), ("d", "first")):
        monkeypatch.setattr(kept_module, "describe_machine", lambda cpu=cpu: {"cpu": cpu})
        rows = KeptRows(path, SETTING)
        rows.add(key, {})
    assert [machine["cpu"] for machine in rows.machines] == ["first", "second"]
    saved = json.loads(path.read_text())
    assert saved["machines"] == rows.machines
    assert saved["measured_on"] == rows.measured_on == {"a": 0, "b": 1, "c": 1, "d": 0}


@pytest.mark.parametrize("others", [[], [{"cpu": "third"}]])
def test_a_file_that_does_not_say_which_machine_is_gone_on_with(tmp_path, others):
    path = tmp_path / "rows.json"
    KeptRows(path, SETTING).add("a", {})
    saved = json.loads(path.read_text())
    del saved["measured_on"]
    saved["machines"] += others
    path.write_text(json.dumps(saved))
    rows = KeptRows(path, SETTING)
    rows.add("b", {})
    assert rows.measured_on == ({"b": 0} if others else {"a": 0, "b": 0}), "known where there was but one"


def test_rows_of_another_model_are_not_mixed_in(tmp_path):
    path = tmp_path / "rows.json"
    KeptRows(path, SETTING).add("a", {})
    with pytest.raises(ConfigurationError, match="model tiny, not large.* choose another --output"):
        KeptRows(path, {**SETTING, "model": "large"})


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"rows": {}}', '{"format": 1}', '{"format": 1, "setting": {}, "rows": {}}']
)
def test_a_file_of_something_else_is_not_overwritten(tmp_path, content):
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(InputError, match="choose another --output"):
        KeptRows(path, SETTING)
    assert path.read_text() == content


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    rows = KeptRows(tmp_path / "file" / "rows.json", SETTING)
    with pytest.raises(InputError, match="cannot write .*rows.json"):
        rows.add("a", {})
