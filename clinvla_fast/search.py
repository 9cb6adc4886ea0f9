"""Search over an embedded collection with FAISS: text to images, image to reports, image to images."""

from collections.abc import Iterator
from numbers import Integral
from pathlib import Path
from typing import Literal, NamedTuple

import faiss
import numpy as np
import torch
from torch import Tensor

from .collection import model_sha256, part_path, read_collection, read_part
from .errors import DataError
from .modeling.model import ClinVLA

Kind = Literal["image", "text"]
_TRAINING_ROWS = 2**18  # that an index with something to learn is trained on; spread over the collection


class Hit(NamedTuple):
    """A study that a search found."""

    id: str
    score: float  # cosine


class Collection:
    """A finished folder of `embed`, to read and to search.

    Args:
        path: the folder.
        index: what FAISS builds, in the words of its index_factory. "Flat" is exact; "HNSW32" is approximate and faster
            in collections of millions.

    Raises:
        DataError: if the folder holds no finished collection.
    """

    def __init__(self, path: str | Path, index: str = "Flat"):
        self.path, self._factory = Path(path), index
        known = read_collection(self.path)
        if "counts" not in known:
            raise DataError(f"{self.path} is not finished: embed it again with the same arguments, and it goes on.")
        self.width, self.counts = known["width"], known["counts"]
        self.precision = known.get("precision")  # of the towers that embedded it, and that are to embed queries
        self._parts, self._model = known["parts"], known["model_sha256"]
        self._indexes: dict[Kind, tuple[object, list[str]]] = {}

    def check_model(self, model: ClinVLA) -> None:
        """Make sure that queries embedded by `model` mean something here.

        Raises:
            DataError: if another model embedded this collection, or this one with its towers in another dtype.
        """
        if model_sha256(model) != self._model:
            inside = f" (its towers in {self.precision})" if self.precision else ""
            raise DataError(
                f"{self.path} was embedded by another model{inside}: search it with that one, or embed it again."
            )

    def embeddings(self, kind: Kind) -> Iterator[tuple[list[str], np.ndarray]]:
        """The ids of all studies that have an image or a report, and the embeddings of that, float32 [n, D], a part of
        the collection at a time."""
        for number in range(self._parts):
            part, tensors = read_part(part_path(self.path, number))
            there = tensors.get_tensor(f"has_{kind}")
            ids = [i for i, has in zip(part["ids"], there, strict=True) if has]
            yield ids, tensors.get_tensor(kind)[there]

    def search(self, queries: Tensor | np.ndarray, kind: Kind = "image", k: int = 10) -> list[list[Hit]]:
        """The k studies nearest to each query, the nearest first. The first search of a kind builds its index, in
        memory: 4 D bytes a study where it is exact.

        Args:
            queries: [q, D], L2-normalised, of images or of texts: what encode_images and encode_reports return.
            kind: what to search in: "image", or "text" for reports.
            k: at least 1; fewer are found where the collection, or an approximate index, has fewer.

        Raises:
            DataError: if FAISS cannot build such an index, the queries have another shape or are not finite, or no
                study has an image or report.
        """
        rows = np.ascontiguousarray(torch.as_tensor(queries).float().cpu().numpy())
        if rows.ndim != 2 or rows.shape[1] != self.width or not np.isfinite(rows).all():
            raise DataError(f"queries are {list(rows.shape)}: expected finite numbers, [q, {self.width}].")
        if kind not in ("image", "text") or not isinstance(k, Integral) or k < 1:
            raise DataError(f"kind is {kind!r} and k is {k}: expected image or text, and at least 1.")
        if kind not in self._indexes:
            self._indexes[kind] = self._build(kind)
        index, ids = self._indexes[kind]
        found = zip(*index.search(rows, min(int(k), len(ids))), strict=True)
        return [[Hit(ids[i], float(s)) for s, i in zip(*pair, strict=True) if i >= 0] for pair in found]  # -1: none

    def _build(self, kind: Kind) -> tuple[object, list[str]]:
        kept = self.counts["kept"][kind]
        if not kept:
            raise DataError(f"{self.path} has no {kind} to search in: expected studies embedded with theirs.")
        try:
            index = faiss.index_factory(self.width, self._factory, faiss.METRIC_INNER_PRODUCT)
            if not index.is_trained:
                step = -(-kept // _TRAINING_ROWS)
                index.train(np.concatenate([rows[::step] for _, rows in self.embeddings(kind)]))
            ids: list[str] = []
            for names, rows in self.embeddings(kind):
                index.add(rows)
                ids += names
        except RuntimeError as error:  # all that FAISS raises, with its source line before and the reason at the end
            reason = str(error).rpartition(": ")[2]
            raise DataError(f"FAISS cannot build the index {self._factory!r} of {kept} studies ({reason}).") from None
        if len(ids) != kept:
            found = f"{len(ids)} studies with {kind} where collection.json has {kept}"
            raise DataError(f"{self.path} has {found}: embed it again into another folder.")
        return index, ids
