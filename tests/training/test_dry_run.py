"""What a step would take, from smaller ones."""

import pytest

from training.dry_run import step_seconds

REST, STUDY, PAIR = 0.5, 0.03, 0.002  # seconds of a step whatever is in it, of a study, of a pair


def seconds(n: int) -> float:
    return REST + n * STUDY + n**2 * PAIR


@pytest.mark.parametrize("unit", [1.0, 1e9])
def test_a_step_takes_so_much_a_study_and_so_much_a_pair(unit):
    """Work may be counted in any unit."""
    work, measured = (STUDY * unit, PAIR * unit), [(n, seconds(n)) for n in (4, 12)]
    assert step_seconds(measured, 256, 256, *work) == pytest.approx(seconds(256))
    in_chunks = 4 / 3 * 256 / 32 * (REST + 32 * STUDY) + 256**2 * PAIR  # all pairs, once; towers forward twice
    assert step_seconds(measured, 256, 32, *work) == pytest.approx(in_chunks)
    assert step_seconds([(4, 1.0), (12, 2.0)], 20, 20, 1, 0) == pytest.approx(3.0)
