"""Studies that even a model with random weights can tell apart: some films show a bright square. Where there is a
prior, the square has become darker, brighter, or neither."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from clinvla_fast.data.shards import PROGRESSIONS, Box, Study, write_shards

_SIDE = 64
_LEVELS = {"improving": (230, 110), "stable": (170, 170), "worsening": (110, 230)}  # of the prior, of now
_NAME = "square"


def _studies(split: str, patients: int, seed: int = 0, priors: bool = True) -> list[Study]:
    """Two studies a patient; every other patient has a square."""
    random, found = np.random.default_rng([seed, len(split)]), []
    for patient in range(patients):
        for number in range(2):
            name = f"{split}-{patient}-{number}"
            top, left = random.integers(4, 28, 2)
            course = PROGRESSIONS[random.integers(3)] if patient % 2 else ""
            films = [_film(random, level, top, left) for level in _LEVELS.get(course, (0, 0))]
            images = {"frontal": films[1]} | ({"prior_frontal": films[0]} if priors else {})
            shares = left / _SIDE, top / _SIDE, 0.5, 0.5
            given = {
                "labels": (_NAME if course else "no finding",),
                "boxes": (Box(_NAME, "frontal", *shares),) if course else (),
                "progressions": ((_NAME, course),) if course else (),
            }
            found.append(Study(name, f"{split}-{patient}", split, "", images, **given))
    return found


def _film(random: np.random.Generator, level: int, top: int, left: int) -> np.ndarray:
    film = random.integers(20, 90, (_SIDE, _SIDE)).astype(np.uint8)
    if level:
        film[top : top + _SIDE // 2, left : left + _SIDE // 2] = level
    return film


def _shuffled(studies: Sequence[Study]) -> list[Study]:
    """What is known of the studies, among them."""
    order = np.random.default_rng(5).permutation(len(studies))
    known = ("labels", "boxes", "progressions")
    return [
        replace(study, **{name: getattr(studies[other], name) for name in known})
        for study, other in zip(studies, order, strict=True)
    ]


def _written(out: Path, *splits: Sequence[Study]) -> Path:
    write_shards({of[0].split: of for of in splits}, lambda study: [study], out, source="csv", settings={}, workers=1)
    return out


@pytest.fixture(scope="session")
def squares() -> SimpleNamespace:
    """label: of what there is to find; train, validate, test: studies; the functions above."""
    splits = {split: _studies(split, patients) for split, patients in (("train", 30), ("validate", 10), ("test", 30))}
    return SimpleNamespace(label=_NAME, studies=_studies, shuffled=_shuffled, written=_written, **splits)
