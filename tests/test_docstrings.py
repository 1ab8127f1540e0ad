"""What help() shows of public names: there is something, it names all parameters, and says when an error is raised.

That the examples hold is in test_readme.py.
"""

import importlib
import importlib.util
import inspect
import re
import types

import pytest

import ruvector_numba as rv

TITLES = "Parameters|Attributes|Returns|Yields|Raises|See Also|Notes|References|Examples"
DESCRIPTORS = property, classmethod, staticmethod


def public():
    """Every public thing by its path, those of classes included."""
    modules = [rv, rv.functional, rv.interop, rv.masks, rv.optim]
    there = [name for name in ("onnx", "torch") if importlib.util.find_spec(name)]
    modules += [importlib.import_module(f"ruvector_numba.interop.{name}") for name in there]
    found = {}
    for module in modules:
        for name in module.__all__:
            thing, path = getattr(module, name), f"{module.__name__}.{name}"
            if not isinstance(thing, types.ModuleType):
                found[path] = thing
                found |= {f"{path}.{member}": x for member, x in members(thing)} if inspect.isclass(thing) else {}
    return found


def members(cls):
    """The public methods and properties that a class has from this package, not those of its libraries."""
    ours = {name for base in cls.__mro__ if base.__module__.startswith("ruvector_numba") for name in vars(base)}
    for name in sorted(name for name in ours if not name.startswith("_")):
        made = inspect.getattr_static(cls, name)
        if callable(made) or isinstance(made, DESCRIPTORS):
            yield name, made if isinstance(made, property) else getattr(cls, name)


def sections(thing):
    """The text above the sections of a NumPy docstring, which may be inherited, and the sections by their titles."""
    head, *parts = re.split(rf"^({TITLES})\n-+\n", inspect.getdoc(thing) or "", flags=re.MULTILINE)
    return head, dict(zip(parts[::2], parts[1::2], strict=True))


def arguments(thing):
    """The names of a function's parameters; none of a property or a class, which may be made by others."""
    if inspect.isclass(thing) or not callable(thing):
        return []
    return [name for name in inspect.signature(thing).parameters if name not in ("self", "cls")]


PUBLIC = public()


def test_there_is_much_that_is_public():
    assert len(PUBLIC) > 250


@pytest.mark.parametrize("path", PUBLIC)
def test_it_is_documented(path):
    head, _ = sections(PUBLIC[path])
    assert re.match(r"\S.*[.?:]", head), "no sentence at the beginning"


@pytest.mark.parametrize("path", [path for path, thing in PUBLIC.items() if arguments(thing)])
def test_all_parameters_are_named(path):
    _, found = sections(PUBLIC[path])
    text = found.get("Parameters", "")
    heads = " ".join(line for line in text.splitlines() if line[:1].strip())
    assert [name for name in arguments(PUBLIC[path]) if not re.search(rf"\b{name}\b", heads)] == []


@pytest.mark.parametrize("path", [path for path, thing in PUBLIC.items() if "Raises" in sections(thing)[1]])
def test_errors_have_their_conditions(path):
    lines = [line for line in sections(PUBLIC[path])[1]["Raises"].splitlines() if line]
    names = [i for i, line in enumerate(lines) if re.match(r"[\w.]+(, \w+)*$", line)]
    assert names and all(lines[i + 1 :] and lines[i + 1].startswith("    ") for i in names)
