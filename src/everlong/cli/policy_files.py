"""Methods from a file of one's own: ``--attention my_policy.py`` or ``my_policy.py:name``."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

from everlong.errors import ConfigurationError, InputError

_loaded: dict[Path, list[str]] = {}  # the names each file registered: it is run once


def method_name(named: str) -> str:
    """Return the registered name that `named` stands for; a Python file is run first.

    Parameters
    ----------
    named : str
        A name, a Python file that registers one policy, or ``file.py:name``.

    Raises
    ------
    InputError
        The file cannot be run.
    ConfigurationError
        It registers no policy of that name, or several and none is named.
    """
    file, colon, name = named.rpartition(":") if not named.endswith(".py") else (named, "", "")
    if not file.endswith(".py"):
        return named
    registered = _registered_by(Path(file))
    if colon and name in registered:
        return name
    if colon or len(registered) != 1:
        if not registered:
            raise ConfigurationError(
                f'{file} registers no policy: put @POLICIES.register("name") above its class, '
                "see docs/adding-a-method.md"
            )
        known = ", ".join(f"{file}:{each}" for each in registered)
        raise ConfigurationError(f"{named} is not one policy; those it registers: {known}")
    return registered[0]


def has_option(name: str, option: str) -> bool:
    """Whether a registered policy has an option; there is none of a name that is not registered."""
    from everlong.attention import POLICIES

    return name in POLICIES and option in {field.name for field in dataclasses.fields(POLICIES[name])}


def _registered_by(path: Path) -> list[str]:
    from everlong.attention import POLICIES

    path = path.resolve()
    if path not in _loaded:
        before = set(POLICIES)
        name = f"everlong_policy_file_{len(_loaded)}_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise InputError(f"cannot take a policy from {path}: {type(error).__name__}: {error}") from error
        _loaded[path] = sorted(set(POLICIES) - before)
    return _loaded[path]
