"""The order in which studies come, epoch after epoch, and a process's part of it: from the seed and the epoch alone."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..distributed import part
from ..errors import DataError


def check_batch(source: Path, studies: int, batch_size: int, ranks: int) -> None:
    """Make sure that there are studies for a training batch, and one of it for each process.

    Raises:
        DataError: if not.
    """
    if studies < batch_size:
        raise DataError(f"{source} has {studies} training studies: expected at least one batch of {batch_size}.")
    if batch_size < ranks:
        raise DataError(f"a batch of {batch_size} studies for {ranks} processes: expected at least one for each.")


class Epochs:
    """Where a loader stands.

    Args: as of StudyLoader; `source` is where the studies are, for errors.

    Raises:
        DataError: if there are fewer studies than one training batch, or fewer studies a batch than processes, or the
            checkpoint is of another job.
    """

    def __init__(
        self,
        source: Path,
        studies: int,
        batch_size: int,
        *,
        train: bool,
        seed: int,
        checkpoint: str | None,
        rank: int,
        ranks: int,
    ):
        if train:
            check_batch(source, studies, batch_size, ranks)
        self._studies, self._batch_size, self._train, self._seed = studies, batch_size, train, seed
        self._rank, self._ranks = rank, ranks
        self._step = batch_size if train else batch_size * ranks  # studies a batch, of all processes
        self._epoch = self._batch = 0
        if checkpoint:
            try:
                self._epoch, done, known = json.loads(checkpoint)
                self._batch, rest = divmod(done, self._step)
            except (ValueError, TypeError):
                raise DataError("the loader's checkpoint is of another version: start this stage again.") from None
            if rest or known != studies:
                raise DataError(
                    f"the loader's checkpoint is of another batch size, number of processes or data: after {done} of "
                    f"{known} studies, and here are batches of {self._step} of {studies}."
                )

    def __len__(self) -> int:
        """Batches an epoch, of this process."""
        if self._train:
            return self._studies // self._batch_size
        return math.ceil(len(range(self._rank, self._studies, self._ranks)) / self._batch_size)

    @property
    def row(self) -> int:
        """Of this process's first study in a training batch."""
        return part(self._batch_size, self._ranks, self._rank).start if self._train else 0

    def batches(self) -> tuple[Iterator[np.ndarray], np.random.Generator]:
        """What is left of this epoch, the numbers of a batch's studies each; and what the epoch draws from after its
        order. `done` is to be called for each batch that was used, and `end` behind the last."""
        random = np.random.default_rng([self._seed % 2**64, self._epoch])
        if self._train:
            order, own = random.permutation(self._studies), part(self._batch_size, self._ranks, self._rank)
        else:
            order, own = np.arange(self._rank, self._studies, self._ranks), slice(None)
        size = self._batch_size
        return (order[i * size : (i + 1) * size][own] for i in range(self._batch, len(self))), random

    def done(self) -> None:
        self._batch += 1

    def end(self) -> None:
        self._epoch, self._batch = self._epoch + 1, 0

    def checkpoint(self) -> str:
        return json.dumps([self._epoch, self._batch * self._step, self._studies])
