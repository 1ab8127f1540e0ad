"""For all tests: what compiling leaves is not looked through again and again."""

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def compiled_code_is_no_garbage():
    """Numba keeps a million objects by the end, in which each full collection took three seconds."""
    gc.freeze()
