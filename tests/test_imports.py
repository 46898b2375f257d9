"""Imports that the garbage collector does not interrupt."""

from __future__ import annotations

import gc

import pytest

from pipeline.imports import uncollected


def test_the_collector_waits_for_the_imports_and_no_longer() -> None:
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_failed_import_leaves_it_on() -> None:
    with pytest.raises(ImportError), uncollected():
        import missing  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled()


def test_a_collector_that_is_off_stays_so() -> None:
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
