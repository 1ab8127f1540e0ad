"""The floors of the house: who may import whom."""

import pathlib
import re

import pytest

import ruvector_numba

ROOT = pathlib.Path(ruvector_numba.__file__).parent
GROUND = {"arrays", "dense_call", "errors", "halves", "visibility"}  # what both upper floors stand on


def imported(path, dots):
    """Which modules of the folder that many levels up a file imports, functions included."""
    found = re.findall(
        rf"^ *from {re.escape(dots)}(?:(\w+)[\w.]* import .*| import (.*))$", path.read_text("utf-8"), re.MULTILINE
    )
    return {name for module, names in found for name in ([module] if module else names.split(", "))}


@pytest.mark.parametrize("path", sorted(ROOT.glob("plan/*.py")), ids=lambda path: path.stem)
def test_plans_import_kernels_and_what_checks_nothing(path):
    assert imported(path, "..") <= GROUND | {"kernels"}


@pytest.mark.parametrize("name", sorted(GROUND))
def test_what_both_floors_stand_on_imports_nothing_else(name):
    assert imported(ROOT / f"{name}.py", ".") <= GROUND


@pytest.mark.parametrize("path", sorted(ROOT.glob("kernels/**/*.py")), ids=lambda path: path.stem)
def test_kernels_import_nothing_from_above(path):
    depth = len(path.relative_to(ROOT / "kernels").parts)
    assert not imported(path, "." * (depth + 1)) and "import ruvector_numba" not in path.read_text("utf-8")
