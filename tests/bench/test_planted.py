"""Planting regressions: every substitution still fits the source, and one that does not ends it."""

import pytest

from bench.planted import PLANTS, ROOT, Plant, planted, substituted


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.what)
def test_each_fits_the_source(plant):
    assert substituted(ROOT, plant) != (ROOT / plant.file).read_text()


@pytest.mark.parametrize(("source", "times"), [("b = 2\n", 0), ("a = 1\na = 1\n", 2), (None, 0)])
def test_a_text_that_is_not_there_once_is_an_error(tmp_path, source, times):
    if source is not None:
        (tmp_path / "module.py").write_text(source)
    with pytest.raises(SystemExit, match=rf"a slower module: expected once in module.py, found {times} times"):
        substituted(tmp_path, Plant("a slower module", "module.py", "a = 1", "a = 2", ""))


def test_the_source_is_as_it_was_afterwards(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("a = 1\n")
    with planted(tmp_path, Plant("worse", "module.py", "a = 1", "a = 2", "")):
        assert path.read_text() == "a = 2\n"
    assert path.read_text() == "a = 1\n"
