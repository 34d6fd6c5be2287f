import importlib
import json
import typing
from pathlib import Path

import pytest

from everlong.attention import POLICIES
from everlong.cli import policy_files
from everlong.cli.policy_files import method_name
from everlong.errors import ConfigurationError, InputError

EXAMPLE = Path(__file__).parents[2] / "examples" / "my_policy.py"
POLICY = """
from everlong.attention import POLICIES, LMInfinite
for name in {names}:
    POLICIES.register(name)(type("Mine", (LMInfinite,), {{}}))
"""


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    monkeypatch.setattr(POLICIES, "_entries", dict(POLICIES._entries))
    monkeypatch.setattr(policy_files, "_loaded", {})


@pytest.mark.parametrize("named", [str(EXAMPLE), f"{EXAMPLE}:dilated"])
def test_the_example_reads_from_the_command_line(everlong, novel, named):
    options = ("--set", "window=40", "--set", "near=8", "--set", "stride=2")
    result = everlong("read", novel, "--attention", named, *options, "--json")
    assert result.code == 0 and json.loads(result.out)["stats"]["kept"] == 40


def test_a_state_of_it_goes_on_when_the_file_is_named_again(everlong, novel, tmp_path, monkeypatch):
    state, named = tmp_path / "novel.state", ("--attention", EXAMPLE)
    everlong("read", novel, *named, "--set", "window=40", "--set", "near=8", "--state", state)
    assert everlong("read", novel, *named, "--state", state).code == 0
    monkeypatch.setattr(POLICIES, "_entries", {k: v for k, v in POLICIES._entries.items() if k != "dilated"})
    result = everlong("read", novel, "--state", state)
    assert result.code == 2 and "follows a policy that is not known here" in result.err


def test_a_file_may_be_called_like_a_module(tmp_path):
    file = tmp_path / "typing.py"
    file.write_text("from typing import Any\n" + POLICY.format(names=["mine"]))
    assert method_name(str(file)) == "mine"
    assert importlib.import_module("typing") is typing


def test_it_is_compared_like_any_other(everlong, novel):
    options = ("--set", "window=40", "--tokens", 200, "--json", "--quiet")
    result = everlong("compare", novel, "--methods", f"lm-infinite, {EXAMPLE}", *options)
    assert [method["name"] for method in json.loads(result.out)["results"]] == ["lm-infinite", "dilated"]


def test_a_name_is_itself_and_a_file_is_run_once(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(POLICY.format(names=["mine-a", "mine-b"]))
    assert method_name("lm-infinite") == "lm-infinite"
    assert [method_name(f"{file}:mine-{which}") for which in "aba"] == ["mine-a", "mine-b", "mine-a"]


@pytest.mark.parametrize(
    "names, named, message",
    [
        (["x-a", "x-b"], "{file}", "not one policy; those it registers: .*:x-a, .*:x-b"),
        (["x-a"], "{file}:x-c", "those it registers: .*:x-a"),
        ([], "{file}", r"registers no policy: put @POLICIES.register\("),
    ],
)
def test_a_file_without_the_policy_meant_is_refused(tmp_path, names, named, message):
    file = tmp_path / "mine.py"
    file.write_text(POLICY.format(names=names))
    with pytest.raises(ConfigurationError, match=message):
        method_name(named.format(file=file))


def test_a_file_that_cannot_be_run_is_refused(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("import everlong.nowhere")
    for file in (broken, tmp_path / "missing.py"):
        with pytest.raises(InputError, match=f"cannot take a policy from .*{file.name}"):
            method_name(str(file))
