"""Retrieval over global embeddings (METHODS of ConVIRT and GLoRIA; ClinVLA, section 4.5.1), as an option re-ranked by
local alignment.

FAISS finds the few candidates of a block that can be among a query's best, by float32 products, whose last digits
depend on how many are multiplied at once. These few are then ordered by their products in float64, which do not, and
equal ones by their number: a ranking depends neither on how the queries were batched nor on the blocks of candidates.
Nothing of queries x candidates is held.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import faiss
import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .. import ops
from ..errors import DataError
from .result import NotApplicable, Result
from .score import Score

if TYPE_CHECKING:
    from ..search import Collection
    from .subject import Subject
    from .tasks import Options

WAYS = {"image to image": ("image", "image"), "text to image": ("text", "image"), "image to text": ("image", "text")}
_SETS = "chexpert-8x200"  # queries and candidates are tables of their own
_PRECISION_AT = {_SETS: (5, 10, 50), "chexpert-5x200": (5, 10, 100)}  # as the papers have it, by source
_ALL_PRECISION_AT, _RECALL_AT = (5, 10, 50, 100), (1, 5, 10)
_BLOCK = 2**16  # candidates at a time
_PAIRS = 2**18  # of queries and candidates that FAISS returns at once
_EXACT = 2**14  # pairs whose products are computed in float64 at once
_BEYOND, _LEAST = 16, 100  # candidates that FAISS returns beyond k; from 100 on it is three times as fast as before
_TEXTS = 2048  # reports whose words are held at once
_SHOWN, _SHOWN_FINDINGS = 5, 14  # results of a query, and the commonest findings, in galleries


def nearest(queries: np.ndarray, blocks: Iterable[np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best candidates of each query by inner product, the best first; of equal ones the one that came first.

    Args:
        queries: [q, D].
        blocks: candidates, [any, D] each, numbered from 0 through all of them.
        k: at least 1; as many are found as there are, where that is fewer.

    Returns:
        numbers int64 [q, k], and products float64 [q, k] of the vectors in float32.

    Raises:
        ValueError: if an embedding is not finite: it has no place in an order.
    """
    queries = _rows(queries)
    best = _Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    bound, first = np.full(len(queries), -np.inf), 0  # what a candidate needs to be among a query's best
    for block in blocks:
        rows = _rows(block)
        found = [f._replace(number=f.number + first) for f in _of_block(queries, rows, bound, k)]
        best, first = _Pairs.joined([best, *found]).cut(k), first + len(rows)
        if first >= k:
            bound = best.score.reshape(len(queries), k)[:, -1]
    return best.number.reshape(len(queries), min(k, first)), best.score.reshape(len(queries), min(k, first))


class _Pairs(NamedTuple):
    """Queries and candidates, flat."""

    query: np.ndarray  # int64
    number: np.ndarray  # int64
    score: np.ndarray  # float64

    @classmethod
    def joined(cls, parts: Sequence[_Pairs]) -> _Pairs:
        return cls(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def cut(self, k: int) -> _Pairs:
        """The k best of each query, by query, the best first."""
        order = np.lexsort((self.number, -self.score, self.query))
        query = self.query[order]
        order = order[np.arange(len(query)) - np.searchsorted(query, query) < k]
        return _Pairs(*(x[order] for x in self))


def _rows(x: np.ndarray) -> np.ndarray:
    rows = np.ascontiguousarray(x, np.float32)
    if not np.isfinite(rows).all():
        raise ValueError("embeddings are not finite: expected L2-normalised vectors; the model or its input is broken.")
    return rows


def _of_block(queries: np.ndarray, rows: np.ndarray, bound: np.ndarray, k: int) -> Iterator[_Pairs]:
    """Of each query the k best rows of a block that are not below its bound.

    Where those that FAISS returns end among equals, to float32's accuracy, it is asked for more.
    """
    longest = [np.sqrt(np.einsum("nd,nd->n", x, x).max(initial=0)) for x in (queries, rows)]
    slack = rows.shape[1] * 2.0**-23 * longest[0] * longest[1]  # twice the rounding of a sum of D products (Higham)
    todo, wide = np.arange(len(queries)), min(len(rows), max(k + _BEYOND, _LEAST))
    while len(todo):
        short = []
        for start in range(0, len(todo), max(1, _PAIRS // wide)):
            some = todo[start : start + max(1, _PAIRS // wide)]
            similarity, index = faiss.knn(queries[some], rows, wide, metric=faiss.METRIC_INNER_PRODUCT)
            least = np.maximum(bound[some], similarity[:, min(k, wide) - 1]) - slack
            more = (similarity[:, -1] >= least) & (wide < len(rows))
            short.append(some[more])
            at, column = np.nonzero((similarity >= least[:, None]) & ~more[:, None])
            query, row = some[at], index[at, column]
            yield _Pairs(query, row, _products(queries, query, rows, row)).cut(k)
        todo, wide = np.concatenate(short), min(len(rows), 8 * wide)


def _products(queries: np.ndarray, query: np.ndarray, rows: np.ndarray, row: np.ndarray) -> np.ndarray:
    found = np.empty(len(query))
    for start in range(0, len(query), _EXACT):
        some = slice(start, start + _EXACT)
        found[some] = (queries[query[some]].astype(np.float64) * rows[row[some]]).sum(-1)
    return found


@dataclass(frozen=True)
class _Ranking:
    """What q queries found among candidates, and what would have been right. Places are of studies.

    way: a name of WAYS.
    units: int64 [q], the queries' places; patients: int64 [q].
    found: int64 [q, k], places, the best first; similarity: float64 [q, k].
    candidates: how many there are.
    own: int64 [q], the query's place where that is a candidate, else -1.
    findings: that queries look for, and finding: int64 [q], which of them each does; -1 for none.
    shows: bool [places, findings]; False of what is no candidate.
    note: what names of scores end in.

    Where findings count a query's own study is left out. It shows the query's finding whatever the labels are: with
    labels that mean nothing precision would still be better than chance.
    """

    way: str
    units: np.ndarray
    patients: np.ndarray
    found: np.ndarray
    similarity: np.ndarray
    candidates: int
    own: np.ndarray
    findings: Sequence[str]
    finding: np.ndarray
    shows: np.ndarray
    note: str = ""

    @property
    def _left(self) -> np.ndarray:
        """Of which queries a candidate is left out: bool [q]."""
        return self.own >= 0

    def others(self) -> tuple[np.ndarray, np.ndarray]:
        """Places and similarities of those found, without what is left out, and as many of each query."""
        if not self._left.any():
            return self.found, self.similarity
        kept = (self.found != self.own[:, None]) | ~self._left[:, None]
        kept[kept.all(1), -1] = False
        return tuple(x[kept].reshape(len(x), x.shape[1] - 1) for x in (self.found, self.similarity))

    def precision(self, k: int) -> Score | None:
        """The share of the k best that show the query's finding, of queries that have one; None where none has."""
        rows = np.flatnonzero(self.finding >= 0)
        finding, left = self.finding[rows], self._left[rows]
        if not len(rows) or self.candidates <= left.any():
            return None
        chance = ((self.shows.sum(0)[finding] - left) / (self.candidates - left)).mean()
        right = self.shows[self.others()[0][rows, :k], finding[:, None]]
        return self._score(f"precision@{k}", right.mean(1), rows, chance)

    def recall(self, k: int) -> Score | None:
        """The share of queries whose own study is among the k best, of those that can find it; None where none can."""
        rows = np.flatnonzero(self.own >= 0)
        if not len(rows) or len(set(WAYS[self.way])) == 1:  # an image finds itself
            return None
        hits = (self.found[rows, :k] == self.own[rows, None]).any(1)
        return self._score(f"recall@{k}", hits.astype(float), rows, min(k, self.candidates) / self.candidates)

    def scores(self, precision_at: Sequence[int], recall_at: Sequence[int]) -> list[Score]:
        """Those that there are candidates enough for."""
        others = self.candidates - self._left.any()
        asked = [(self.precision, k) for k in precision_at if k <= others]
        asked += [(self.recall, k) for k in recall_at if k <= self.candidates]
        return [score for figure, k in asked if (score := figure(k))]

    def _score(self, name: str, value: np.ndarray, rows: np.ndarray, chance: float) -> Score:
        name = f"{self.way}, {name}{self.note}"
        return Score(name, "mean", {"value": value}, self.units[rows], self.patients[rows], float(chance))


def _looked_for(labels: Iterable[Sequence[str]]) -> tuple[list[str], np.ndarray]:
    """The first findings of queries, by name, and which each has: int64 [q], -1 for none."""
    first = [found[0] if found else None for found in labels]
    names = sorted(set(first) - {None})
    numbers = {name: number for number, name in enumerate(names)}
    return names, np.array([numbers.get(name, -1) for name in first], np.int64)


def _shown_by(labels: Sequence[Sequence[str]], findings: Sequence[str]) -> np.ndarray:
    """Which studies show which findings: bool [len(labels), len(findings)]."""
    flags = [[finding in found for finding in findings] for found in labels]
    return np.array(flags, bool).reshape(len(labels), len(findings))


def _spread(places: np.ndarray, most: int | None) -> np.ndarray:
    """At most so many of them, evenly."""
    kept = len(places) if most is None else min(most, len(places))
    return places[np.arange(kept) * len(places) // max(1, kept)]


def retrieval_scores(
    queries: Tensor,
    candidates: Tensor,
    labels: Sequence[Sequence[str]],
    *,
    precision_at: int = 5,
    recall_at: int = 10,
    own: bool = True,
) -> dict[str, float | None]:
    """How well queries find their candidates; query i and candidate i are of the same study i.

    precision@k: the share of the k best candidates, the query's own study left out, that show the query's first
    finding, averaged over the queries that have one; None where none has. recall@k: the share of queries whose own
    study is among the k best. Beside each, what a random order would give.

    Args:
        queries, candidates: L2-normalised embeddings [n, D], n >= 1; taken as float32.
        labels: the findings of each study, the primary one first.
        precision_at, recall_at: k, capped at n.
        own: False where a query would find itself, as from image to image: there is no recall.

    Raises:
        ValueError: if an embedding is not finite: it has no place in an order.
    """
    places, way = np.arange(len(labels)), "text to image" if own else "image to image"
    asked, wanted = (x.detach().float().cpu().numpy() for x in (queries, candidates))
    names, finding = _looked_for(labels)
    found = nearest(asked, [wanted], max(precision_at, recall_at) + 1)
    about = (len(places), places, names, finding, _shown_by(labels, names))
    ranking = _Ranking(way, places, places, *found, *about)
    figures = {f"precision@{precision_at}": ranking.precision(precision_at)}
    if own:
        figures[f"recall@{recall_at}"] = ranking.recall(recall_at)
    scores: dict[str, float | None] = {}
    for name, score in figures.items():
        scores |= {name: score and score.value, f"{name}_chance": score and score.chance}
    return scores


def evaluate_retrieval(subject: Subject, options: Options) -> Result:
    """Images and reports looked for by images and reports: precision@k by finding and recall@k of a query's own study,
    each way that the data allow. For precision a query's own study is no candidate.

    Of CheXpert 8x200 the queries and candidates are those of its tables; of other data, all that have the side in
    question. Reports of the same words are one: which of them has its embedding from which batch must not matter.

    With `options.rerank`, what each query found best, so many of it, is ordered anew by local alignment, between images
    and reports: scores of k below that number are given of both orders.

    Raises:
        NotApplicable: if nothing can be looked for.
        DataError: if it is to re-rank and the model has no local embeddings, embeddings are not finite, a number in
            options is too small, or no candidate of CheXpert 8x200 is of a query's class.
    """
    rerank, queries = options.rerank, options.queries
    if rerank < 0 or (queries is not None and queries < 1):
        raise DataError(f"--rerank is {rerank} and --queries {queries}: expected at least 0, and at least 1.")
    if rerank and not subject.model.recipe.local_weight:
        raise DataError("--rerank needs local embeddings, and this model's method has no local loss: leave it out.")
    words: dict[str, int] = {}
    first = np.array([words.setdefault(study.report, place) for place, study in enumerate(subject.studies)], np.int64)
    precision_at = _PRECISION_AT.get(subject.manifest["source"], _ALL_PRECISION_AT)
    depth = max(*precision_at, *_RECALL_AT, rerank) + 1
    rankings = [r for way in WAYS if (r := _rank(subject, way, first, queries, depth))]
    scores = [score for ranking in rankings for score in ranking.scores(precision_at, _RECALL_AT)]
    if not scores:
        raise NotApplicable(
            f"{subject.root} has nothing to look for in its {subject.split!r} split: expected reports of images, or "
            "images with labels."
        )
    if rerank:
        shallow = [[k for k in ks if k < rerank] for ks in (precision_at, _RECALL_AT)]
        across = [ranking for ranking in rankings if ranking.way != "image to image"]
        scores += [score for ranking in _reranked(subject, across, first, rerank) for score in ranking.scores(*shallow)]
    shown = {
        "queries_in_galleries": "of each finding's queries, in stored order, those a third and two thirds of the way",
        "galleries": [gallery for ranking in rankings for gallery in _galleries(ranking)],
    }
    return Result("retrieval", scores, {"rerank": rerank, "queries": queries}, shown)


def _places(subject: Subject, way: str) -> tuple[np.ndarray, np.ndarray]:
    """The places of a way's queries and candidates in the split."""
    asked, wanted = WAYS[way]
    has = {"image": subject.embedded.has_image, "text": subject.embedded.has_text}
    queries, candidates = has[asked], has[wanted]
    if subject.manifest["source"] == _SETS:
        ids = [study.study_id for study in subject.studies]
        queries = queries & [name.startswith(f"{asked}-retrieval/query/") for name in ids]
        candidates = candidates & [name.startswith(f"{asked}-retrieval/candidate/") for name in ids]
    return np.flatnonzero(queries), np.flatnonzero(candidates)


def _rank(subject: Subject, way: str, first: np.ndarray, most: int | None, depth: int) -> _Ranking | None:
    """What a way's queries find; None where it has no queries or no candidates."""
    asked, wanted = WAYS[way]
    queries, candidates = _places(subject, way)
    queries = _spread(queries, most)
    vectors = {"image": subject.embedded.image.numpy(), "text": subject.embedded.text.numpy()[first]}
    if vectors[asked].shape[1] != vectors[wanted].shape[1]:  # towers of two widths that nothing aligns
        return None
    labels = [study.labels for study in subject.studies]
    numbers = np.full(len(labels), -1)
    numbers[candidates] = np.arange(len(candidates))
    if not len(queries) or not len(candidates):
        return None
    blocks = (vectors[wanted][candidates[at : at + _BLOCK]] for at in range(0, len(candidates), _BLOCK))
    found, similarity = nearest(vectors[asked][queries], blocks, depth)
    names, finding = _looked_for(labels[place] for place in queries)
    shows = _shown_by(labels, names) & (numbers >= 0)[:, None]
    empty = [name for name, anywhere in zip(names, shows.any(0), strict=True) if not anywhere]
    if empty and subject.manifest["source"] == _SETS:
        raise DataError(f"{way}: no candidate shows {', '.join(empty)}, which queries look for: check the tables.")
    about = (len(candidates), np.where(numbers[queries] >= 0, queries, -1), names, finding, shows)
    return _Ranking(way, queries, subject.patients[queries], candidates[found], similarity, *about)


def _galleries(ranking: _Ranking) -> Iterator[dict[str, Any]]:
    """Two queries of each finding, neither the best nor the worst, with what they found best.

    Without labels: two of all, right where they found their own study; from image to image that cannot be said.
    """
    itself = ranking.way == "image to image"
    found, similarity = ranking.others() if ranking.findings or itself else (ranking.found, ranking.similarity)
    counted = Counter(ranking.finding[ranking.finding >= 0].tolist()).most_common(_SHOWN_FINDINGS)
    groups = [(f, np.flatnonzero(ranking.finding == f)) for f, _ in sorted(counted)]
    for finding, rows in groups or [(None, np.arange(len(ranking.units)))]:
        for row in sorted({int(rows[len(rows) * third // 3]) for third in (1, 2)}):
            best = found[row, :_SHOWN]
            right = best == ranking.own[row] if finding is None else ranking.shows[best, finding]
            hits = zip(best.tolist(), similarity[row].tolist(), right.tolist(), strict=False)
            unknown = finding is None and itself
            yield {
                "way": ranking.way,
                "label": None if finding is None else ranking.findings[finding],
                "query": int(ranking.units[row]),
                "results": [{"place": p, "score": s, "right": None if unknown else r} for p, s, r in hits],
            }


def _reranked(subject: Subject, rankings: Sequence[_Ranking], first: np.ndarray, most: int) -> Iterator[_Ranking]:
    """The same with each query's best, so many, ordered anew by local alignment; equals stay in their order."""
    keys = []  # of pairs: text * studies + image
    for ranking in rankings:
        of_query, found = np.broadcast_arrays(ranking.units[:, None], ranking.found[:, :most])
        text, image = (of_query, found) if ranking.way == "text to image" else (found, of_query)
        keys.append(first[text] * len(first) + image)
    pairs = np.unique(np.concatenate([key.ravel() for key in keys])) if keys else np.zeros(0, np.int64)
    aligned = _aligned(subject, *np.divmod(pairs, len(first)))
    for ranking, key in zip(rankings, keys, strict=True):
        order = np.argsort(-aligned[np.searchsorted(pairs, key)], axis=1, kind="stable")
        found = np.concatenate([np.take_along_axis(ranking.found, order, 1), ranking.found[:, most:]], 1)
        yield replace(ranking, found=found, note=", re-ranked")


@torch.inference_mode()
def _aligned(subject: Subject, text: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Local alignment of reports and images at these places, float32 [pairs]; by report in ascending order.

    The words of some reports are held, and every image goes past them: of images one batch is held.
    """
    model, scores = subject.model, np.empty(len(text), np.float32)
    _, *taus = model.objective.scales()
    places = np.unique(text)
    for start in range(0, len(places), _TEXTS):
        held = places[start : start + _TEXTS]
        words, at = [], 0
        for batch in subject.batches():
            _, local, mask = model.embed_reports(batch.tokens, batch.lengths)
            words += [local[place - at][mask[place - at]] for place in held[(held >= at) & (held < at + len(batch))]]
            at += len(batch)
        features = pad_sequence(words, batch_first=True)
        lengths = torch.tensor([len(x) for x in words], device=features.device)
        masks = torch.arange(features.shape[1], device=features.device) < lengths[:, None]
        pairs = np.flatnonzero((text >= held[0]) & (text <= held[-1]))
        pairs, at = pairs[np.argsort(image[pairs], kind="stable")], 0
        for batch in subject.batches():
            _, local, mask = model.embed_images(batch.images, batch.present)
            for row in range(len(batch)):
                of_image = pairs[slice(*np.searchsorted(image[pairs], [at + row, at + row + 1]))]
                if len(of_image):
                    chosen = torch.from_numpy(np.searchsorted(held, text[of_image])).to(features.device)
                    one = local[row : row + 1], mask[row : row + 1]
                    logits = ops.local_alignment(*one, features[chosen], masks[chosen], *taus)
                    scores[of_image] = logits[0].float().cpu().numpy()
            at += len(batch)
    return scores


def evaluate_collection(
    source: Collection | Mapping[str, np.ndarray],
    labels: Mapping[str, Sequence[str]] | Sequence[Sequence[str]] | None = None,
    *,
    way: str = "text to image",
    queries: int | None = 2000,
    precision_at: Sequence[int] = _ALL_PRECISION_AT,
    recall_at: Sequence[int] = _RECALL_AT,
    progress: Callable[[int, int], None] = lambda done, candidates: None,
) -> list[Score]:
    """Retrieval in a collection of any size: its candidates go past some queries once, a block at a time.

    Args:
        source: a Collection, or arrays `image` and `text` [n, D], L2-normalised, of which row i is of the same study;
            they may be memory-mapped.
        labels: each study's findings, the primary one first, by its id in the collection or its row in the arrays.
            None: recall alone.
        way: a name of WAYS. From image to image there is no recall.
        queries: at most so many, spread evenly over all; None: all.
        precision_at, recall_at: k; those of more than there are candidates are left out.
        progress: called with (candidates seen, candidates).

    Returns:
        Scores as those of `evaluate_retrieval`; their units are rows of what is asked by. Every study counts as a
        patient of its own: a collection does not say whose they are.

    Raises:
        DataError: if there is nothing to ask by or to look for, a label or array is missing, or shapes do not fit.
        ValueError: if an embedding is not finite.
    """
    if way not in WAYS or (queries is not None and queries < 1):
        raise DataError(f"way is {way!r} and queries {queries}: expected one of {', '.join(WAYS)}, and at least 1.")
    asked, wanted = WAYS[way]
    counts = {kind: _count(source, kind) for kind in (asked, wanted)}
    units = _spread(np.arange(counts[asked]), queries)
    ids, vectors, at = [], [], 0
    for names, rows in _parts(source, asked):
        inside = units[(units >= at) & (units < at + len(names))] - at
        ids += [names[row] for row in inside]
        vectors.append(rows[inside])
        at += len(names)
    findings, finding = _looked_for(_labels_of(labels, ids))
    of_id, own, shows = {name: query for query, name in enumerate(ids)}, np.full(len(ids), -1), []

    def blocks() -> Iterator[np.ndarray]:
        seen = 0
        for names, rows in _in_blocks(_parts(source, wanted)):
            for number, name in enumerate(names, start=seen):
                if name in of_id:
                    own[of_id[name]] = number
            shows.append(_shown_by(_labels_of(labels, names), findings))
            seen += len(names)
            yield rows
            progress(seen, counts[wanted])

    found = nearest(np.concatenate(vectors), blocks(), max(*precision_at, *recall_at) + 1)
    about = (counts[wanted], own, findings, finding, np.concatenate(shows))  # known once all blocks have gone by
    return _Ranking(way, units, units, *found, *about).scores(precision_at, recall_at)


def _count(source: Collection | Mapping[str, np.ndarray], kind: str) -> int:
    if not isinstance(source, Mapping):
        count = source.counts["kept"][kind]
    elif kind in source and {x.shape for x in source.values()} == {source[kind].shape} and source[kind].ndim == 2:
        count = len(source[kind])
    else:
        found = {name: list(x.shape) for name, x in source.items()}
        raise DataError(f"arrays are {found}: expected image and text, both [n, D] of the same studies.")
    if not count:
        raise DataError(f"there is no {kind} among what was embedded.")
    return count


def _parts(source: Collection | Mapping[str, np.ndarray], kind: str) -> Iterator[tuple[Sequence, np.ndarray]]:
    """Ids and embeddings, some at a time."""
    if not isinstance(source, Mapping):
        yield from source.embeddings(kind)
        return
    for start in range(0, len(source[kind]), _BLOCK):
        rows = source[kind][start : start + _BLOCK]
        yield range(start, start + len(rows)), rows


def _in_blocks(parts: Iterable[tuple[Sequence, np.ndarray]]) -> Iterator[tuple[list, np.ndarray]]:
    """The same, about _BLOCK at a time: FAISS is faster with many."""
    names: list = []
    held: list[np.ndarray] = []
    for some, rows in parts:
        names += some
        held.append(rows)
        if len(names) >= _BLOCK:
            yield names, np.concatenate(held)
            names, held = [], []
    if names:
        yield names, np.concatenate(held)


def _labels_of(labels: Mapping | Sequence | None, ids: Sequence) -> list[Sequence[str]]:
    try:
        return [() if labels is None else labels[name] for name in ids]
    except (KeyError, IndexError):
        raise DataError("labels miss some studies: expected those of each, by id or by row.") from None
