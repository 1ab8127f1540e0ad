"""What the documentation shows is true: the README's code runs, and the examples in the docstrings hold."""

import doctest
import importlib
import pathlib
import re
import sys

import pytest

README = pathlib.Path(__file__).resolve().parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


def test_the_python_blocks_run_in_order():
    """As a reader would type them, one after the other into one session; what is printed is what they say beside it."""
    blocks = [code for language, code in BLOCKS if language == "python"]
    assert len(blocks) >= 4
    code, printed = "", []

    def note(*values):
        line = code.splitlines()[sys._getframe(1).f_lineno - 1]
        printed.append((line, " ".join(map(str, values))))

    session = {"__name__": "readme", "print": note}
    for number, code in enumerate(blocks, 1):  # `note` reads the code
        exec(compile(code, f"README.md, Python block {number}", "exec"), session)
    said = [(line.partition("  # ")[2], text) for line, text in printed if "  # " in line]
    assert len(said) >= 11
    assert [(comment, text) for comment, text in said if not _tells(comment, text)] == []
    told = "\n".join(text for _, text in printed)
    assert "(2, 8, 512, 64) (2, 8, 512, 64) (2, 8, 512, 64)" in told
    assert "[[1 0 0 0]\n [1 1 0 0]\n [0 1 1 0]\n [0 0 1 0]]" in told


def _tells(comment, text):
    """A comment is the text itself, "..." for a part of it, or the text, a colon and an explanation."""
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return comment.startswith(f"{text}: ") or doctest.OutputChecker().check_output(comment, text, flags)


@pytest.mark.parametrize("command", ['pip install ".[demo]" && ruvector-numba demo', 'pip install ".[test]" && pytest'])
def test_the_two_commands_stand_alone_in_a_block(command):
    assert [code for _, code in BLOCKS if code.strip() == command]


def test_the_first_example_is_short():
    lines = [line for line in BLOCKS[0][1].splitlines() if line.strip()]
    assert len(lines) <= 12


MODULES = [
    "", ".builder", ".config", ".dense", ".errors", ".functional", ".graphs.edge_softmax", ".graphs.gat",
    ".graphs.graph", ".graphs.hgt", ".graphs.layer", ".graphs.neighbors", ".graphs.results", ".graphs.sampling",
    ".graphs.transformer", ".interop.onnx", ".interop.pyg", ".interop.states", ".kv_cache", ".masks", ".multi_head",
    ".optim", ".parameters", ".protocols", ".results", ".runtime", ".scaled_dot_product",
]  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_the_docstrings_hold(name):
    """Each by itself, with no names but those it imports: as it is pasted from help()."""
    failed, tried = doctest.testmod(importlib.import_module(f"ruvector_numba{name}"), globs={})
    assert failed == 0 and tried
