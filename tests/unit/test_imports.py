"""Importing the libraries without Python's garbage collector."""

import gc

import pytest

from qwen_vl_sft.imports import quick_imports


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_off_while_libraries_are_imported_and_then_as_before(enabled):
    frozen = gc.get_freeze_count()
    if not enabled:
        gc.disable()
    try:
        with quick_imports():
            library = [[number] for number in range(10_000)]
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
        assert gc.get_freeze_count() >= frozen + len(library)
        with pytest.raises(ZeroDivisionError), quick_imports():
            _ = 1 / 0
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
