"""The public names and their signatures match a snapshot.

Describe every change of the snapshot in CHANGELOG.md, since it affects users.
``python tests/packaging/test_signatures.py`` prints the current signatures.
"""

from __future__ import annotations

import importlib
import inspect
import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import simpo_ext  # noqa: F401  (registers the ops)

SNAPSHOT = Path(__file__).with_name("signatures.json")
MODULES = (
    "simpo_ext",
    "simpo_ext.functional",
    "simpo_ext.modules",
    "simpo_ext.distributed",
    "simpo_ext.integrations.trl",
    "simpo_ext.integrations.llamafactory",
)


def shown(hint: Any) -> str:
    """The text of a type, which depends neither on the version of Python nor on modules."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(shown, arguments))
    if origin is typing.Literal:
        return f"Literal[{', '.join(map(repr, arguments))}]"
    if hint is type(None) or hint is Ellipsis or isinstance(hint, str):
        return {type(None): "None", Ellipsis: "..."}.get(hint, hint)
    if isinstance(hint, list):
        return f"[{', '.join(map(shown, hint))}]"
    name = getattr(origin or hint, "__name__", str(hint))
    return f"{name}[{', '.join(map(shown, arguments))}]" if arguments else name


def described(parameter: inspect.Parameter, hints: dict[str, Any]) -> str:
    """The kind, name, type and default of a parameter."""
    hint = parameter.annotation
    if isinstance(hint, str):
        hint = hints.get(parameter.name, hint)
    name = "" if hint is inspect.Parameter.empty else f": {shown(hint)}"
    default = "" if parameter.default is inspect.Parameter.empty else f" = {parameter.default!r}"
    return f"{parameter.kind.name.lower()} {parameter.name}{name}{default}"


def signature(function: Any) -> list[str]:
    try:
        hints = typing.get_type_hints(function)
    except NameError:  # a name that is only imported for type checkers
        hints = {}
    parameters = inspect.signature(function).parameters.values()
    returned = f"-> {shown(hints['return'])}" if "return" in hints else "->"
    return [*(described(p, hints) for p in parameters), returned]


def members(value: type) -> Iterator[tuple[str, Any]]:
    """The public methods that a class defines itself."""
    for name, member in vars(value).items():
        function = member.__func__ if isinstance(member, staticmethod | classmethod) else member
        if isinstance(function, types.FunctionType) and not name.startswith("_"):
            yield name, function


def public_signatures() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    first_names: dict[int, str] = {}
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in sorted(module.__all__):
            value = getattr(module, name)
            path = f"{module_name}.{name}"
            first_name = first_names.setdefault(id(value), path)
            if first_name != path:
                found[path] = [f"is {first_name}"]
                continue
            if isinstance(value, type):
                found[path] = signature(value.__init__)
                if hasattr(value, "_fields"):
                    found[path] = list(value._fields)
                for member_name, member in members(value):
                    found[f"{path}.{member_name}"] = signature(member)
            elif callable(value):
                found[path] = signature(value)
            else:
                found[path] = [type(value).__name__]
    return found


def op_schemas() -> dict[str, list[str]]:
    schemas = torch._C._jit_get_all_schemas()
    return {s.name: [str(s)] for s in schemas if s.name.startswith("simpo_ext::")}


def current() -> dict[str, list[str]]:
    return dict(sorted({**public_signatures(), **op_schemas()}.items()))


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
def test_public_names_signatures_and_schemas_match_the_snapshot() -> None:
    expected = json.loads(SNAPSHOT.read_text())
    found = current()
    assert found.keys() == expected.keys()
    for name, lines in expected.items():
        assert found[name] == lines, name


if __name__ == "__main__":
    print(json.dumps(current(), indent=1))
