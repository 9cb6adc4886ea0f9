"""Phantoms: exact projections, consistent views, honest labels and reports, reproducible bytes."""

import re
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise

import numpy as np
import pytest

from clinvla_fast.data.phantom import FINDINGS, boxes, patient_truths, phantom_studies, render, write_report
from clinvla_fast.data.phantom.anatomy import FRONTAL, LATERAL, Body, Ellipsoid, Pose, Solid, film, project, rotation
from clinvla_fast.data.phantom.findings import LOBES, Finding, StudyTruth, chest_of, finding_solids
from clinvla_fast.data.shards import SPLITS, VIEWS

SIZE = 128
SEVERE = [
    Finding("cardiomegaly", 0.5),
    Finding("pleural effusion", 0.4, side="left"),
    Finding("pleural effusion", 0.4, side="bilateral"),
    Finding("pneumothorax", 0.4, side="right"),
    *(Finding("consolidation", 0.5, side="right" if x[0] == "R" else "left", lobe=x, seed=1) for x in LOBES),
    Finding("edema", 0.5, side="bilateral", seed=2),
    *(Finding("nodule", 0.5, side="right" if x[0] == "R" else "left", lobe=x, seed=3) for x in LOBES),
    Finding("support devices", side="left", kind="pacemaker", seed=4),
    Finding("support devices", kind="endotracheal tube", seed=5),
    Finding("support devices", side="right", kind="central line", seed=6),
]
LATERAL_ONLY = [
    Finding("pleural effusion", 0.2, side="left", kind="posterior"),
    Finding("pleural effusion", 0.1, side="right", kind="posterior"),
    Finding("fracture", 0.1, kind="T7"),
    Finding("fracture", 0.9, kind="T9"),
]


def make(*findings: Finding, seed: int = 0) -> StudyTruth:
    rng = np.random.default_rng(seed)
    return StudyTruth("s", "p", "train", Body.draw(rng), Pose.draw(rng), findings, (), False, True, seed)


def name(finding: Finding) -> str:
    return "-".join(filter(None, (finding.label, finding.kind, finding.lobe, finding.side)))


@pytest.fixture(scope="module")
def truths() -> list[list[StudyTruth]]:
    return [patient_truths(0, patient) for patient in range(1000)]


@pytest.fixture(scope="module")
def studies():
    return list(phantom_studies(24, seed=5, size=64))


def equal(one, other) -> bool:
    return (
        (one.study_id, one.report, one.labels, one.split) == (other.study_id, other.report, other.labels, other.split)
        and one.images.keys() == other.images.keys()
        and all(np.array_equal(one.images[view], other.images[view]) for view in one.images)
    )


def test_same_seed_same_studies(studies):
    again = list(phantom_studies(24, seed=5, size=64))
    assert len(again) == len(studies)
    assert all(map(equal, studies, again))


def test_studies_say_where_their_findings_are_and_what_became_of_them(studies):
    courses = {"improved": "improving", "stable": "stable", "worsened": "worsening"}
    truths = [truth for patient in range(24) for truth in patient_truths(5, patient)]
    for study, truth in zip(studies, truths, strict=True):
        pixels = [
            (label, view, place) for label, views in boxes(truth, 64).items() for view, place in views.items() if place
        ]
        assert [box[:2] for box in study.boxes] == [found[:2] for found in pixels]
        for box, (_, view, place) in zip(study.boxes, pixels, strict=True):
            corners = (box.left, box.top, box.left + box.width, box.top + box.height)
            assert view in study.images and corners == tuple(edge / 64 for edge in place)
        assert dict(study.progressions) == {f.label: courses[f.change] for f in truth.findings if f.change in courses}
    assert {box.label for study in studies for box in study.boxes} == set(FINDINGS[1:])
    assert any(study.progressions for study in studies)


def test_films_are_of_all_solids_at_once(truths):
    """What studies have in common is projected once, to the same bits."""
    for truth in (t for patient in truths[:12] for t in patient):
        solids, rays = chest_of(truth).solids, truth.pose.rays(FRONTAL, 64)
        expected = film(project(solids, FRONTAL, *rays), FRONTAL, truth.body, truth.pose, truth.seed)
        for _ in range(2):
            np.testing.assert_array_equal(render(truth, 64)["frontal"], expected)


def test_another_seed_gives_other_studies(studies):
    other = list(phantom_studies(4, seed=6, size=64))
    assert not any(
        np.array_equal(a.images["frontal"], b.images["frontal"]) for a, b in zip(studies, other, strict=False)
    )


def test_more_patients_begin_with_the_same_ones(studies):
    few = list(phantom_studies(3, seed=5, size=64))
    assert all(map(equal, few, studies))


def test_a_consumer_may_stop_early():
    assert len(list(islice(phantom_studies(64, size=64), 3))) == 3


@pytest.mark.parametrize(("patients", "size"), [(0, 128), (4, 32)])
def test_bad_arguments_fail_at_the_call(patients, size):
    with pytest.raises(ValueError, match="expected at least"):
        phantom_studies(patients, size=size)


def test_studies_keep_the_contract_of_shards(studies):
    for study in studies:
        assert study.split in SPLITS
        assert set(study.images) <= set(VIEWS)
        assert "frontal" in study.images
        assert all(image.shape == (64, 64) and image.dtype == np.uint8 for image in study.images.values())
        assert set(study.labels) <= set(FINDINGS)
        assert len(set(study.labels)) == len(study.labels)


def test_priors_are_the_images_of_the_previous_study(studies):
    followups = 0
    for before, study in pairwise(studies):
        prior = {view.removeprefix("prior_"): image for view, image in study.images.items() if "prior" in view}
        if before.patient_id != study.patient_id:
            assert not prior
            continue
        followups += 1
        own = {view: image for view, image in before.images.items() if "prior" not in view}
        assert prior.keys() == own.keys()
        assert all(np.array_equal(prior[view], own[view]) for view in own)
    assert followups > 5


def voxel_sum(solid: Solid, axis: int, rows: np.ndarray, columns: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """The line integral by brute force: density at sample points, summed along the ray."""
    grid = {1: rows[:, None, None], 2 - axis: columns[None, :, None], axis: depth[None, None, :]}
    point = np.stack(np.broadcast_arrays(grid[0], grid[1], grid[2]), axis=-1)

    def holds(body: Ellipsoid) -> np.ndarray:
        local = (point - body.centre) @ (np.eye(3) if body.turn is None else body.turn)
        return ((local / body.radii) ** 2).sum(-1) <= 1

    inside = np.all([*map(holds, solid.inside)], axis=0) & (point >= solid.low).all(-1) & (point <= solid.high).all(-1)
    for body in solid.minus:
        inside &= ~holds(body)
    return solid.density * inside.sum(-1) * (depth[1] - depth[0])


@pytest.mark.parametrize("axis", [FRONTAL, LATERAL])
@pytest.mark.parametrize("seed", range(4))
def test_projections_equal_voxel_sums(axis, seed):
    rng = np.random.default_rng(seed)

    def ellipsoid(smallest: float, largest: float) -> Ellipsoid:
        centre, radii = rng.uniform(-8, 8, 3), rng.uniform(smallest, largest, 3)
        return Ellipsoid(tuple(centre), tuple(radii), rotation(*rng.uniform(-90, 90, 3)))

    first, second = ellipsoid(15, 30), ellipsoid(15, 30)
    third, fourth, fifth = (ellipsoid(5, 15) for _ in range(3))
    rows = columns = np.linspace(-38, 38, 27)
    step = 0.08
    depth = np.arange(-42, 42, step)
    for solid in (
        Solid(1.0, (first,)),
        Solid(-0.7, (replace(first, turn=None),)),
        Solid(2.0, (first, second)),
        Solid(1.0, (first,), minus=(third, fourth, fifth)),
        Solid(1.0, (first, second), minus=(third,), low=(-9, -8, -12), high=(12, 13, 11)),
    ):
        exact = project([solid], axis, rows, columns)
        brute = voxel_sum(solid, axis, rows, columns, depth)
        assert brute.any()
        # Each of at most eight interval ends is off by less than a step.
        np.testing.assert_allclose(exact, brute, atol=8 * step * abs(solid.density))


def test_projections_add_up():
    chest = chest_of(make())
    rays = make().pose.rays(FRONTAL, 64)
    parts = project(chest.solids[:50], FRONTAL, *rays) + project(chest.solids[50:], FRONTAL, *rays)
    np.testing.assert_allclose(project(chest.solids, FRONTAL, *rays), parts, atol=1e-3)


@pytest.mark.parametrize("size", [64, 128, 512])
def test_the_geometry_does_not_depend_on_the_size(size):
    truth = make(Finding("nodule", 0.9, side="right", lobe="RUL", seed=3))
    left, top, right, bottom = (edge / size for edge in boxes(truth, size)["nodule"]["frontal"])
    expected = [edge / 256 for edge in boxes(truth, 256)["nodule"]["frontal"]]
    np.testing.assert_allclose([left, top, right, bottom], expected, atol=1.5 / min(size, 256))


@pytest.mark.parametrize("finding", [f for f in SEVERE if f.label != "cardiomegaly"], ids=name)
def test_both_views_show_an_object_at_the_same_height(finding):
    truth = make(finding, seed=1)
    solids = finding_solids(finding, chest_of(truth))
    heights = []
    for axis in (FRONTAL, LATERAL):
        rows = np.flatnonzero(np.abs(project(solids, axis, *truth.pose.rays(axis, SIZE))).max(1) > 1)
        heights.append((rows[0], rows[-1]))
    # A ray may miss a thin tip in one view and not in the other.
    np.testing.assert_allclose(*heights, atol=2)


@pytest.mark.parametrize("seed", range(5))
def test_a_large_heart_has_a_large_ratio(seed):
    def ratio(truth: StudyTruth) -> float:
        chest = chest_of(truth)
        return 2 * chest.heart.reach[0] / chest.thoracic_width

    assert ratio(make(seed=seed)) < 0.5
    ratios = [ratio(make(Finding("cardiomegaly", severity), seed=seed)) for severity in (0.1, 0.5, 0.9)]
    assert ratios[0] > 0.55
    assert ratios == sorted(ratios)
    np.testing.assert_allclose(ratios[1], Finding("cardiomegaly", 0.5).heart_ratio, atol=0.01)


@pytest.mark.parametrize("finding", SEVERE, ids=name)
def test_a_finding_changes_the_films_inside_its_box_alone(finding):
    truth = make(finding, seed=2)
    box = boxes(truth, SIZE)[finding.label]
    present, absent = render(truth, SIZE), render(replace(truth, findings=()), SIZE)
    for view in ("frontal", "lateral"):
        change = np.abs(present[view].astype(int) - absent[view])
        left, top, right, bottom = box[view]
        assert (change[top:bottom, left:right] >= 20).sum() >= 20, "clearly visible"
        outside = change.copy()
        outside[top:bottom, left:right] = 0
        assert outside.max() <= 8


@pytest.mark.parametrize("finding", LATERAL_ONLY, ids=name)
@pytest.mark.parametrize("seed", range(4))
def test_lateral_findings_are_hidden_in_the_frontal_view(finding, seed):
    truth = make(finding, seed=seed)
    present, absent = render(truth, SIZE), render(replace(truth, findings=()), SIZE)
    assert finding.lateral_only
    assert np.abs(present["frontal"].astype(int) - absent["frontal"]).max() <= 1
    assert (np.abs(present["lateral"].astype(int) - absent["lateral"]) >= 20).sum() >= 25
    box = boxes(truth, SIZE)[finding.label]
    assert box["frontal"] is None
    assert box["lateral"] is not None


@pytest.mark.parametrize("label", ["pleural effusion", "pneumothorax"])
def test_the_patients_left_is_the_images_right(label):
    for side, half in (("left", 1), ("right", 0)):
        truth = make(Finding(label, 0.5, side=side))
        present, absent = render(truth, SIZE), render(replace(truth, findings=()), SIZE)
        change = np.abs(present["frontal"].astype(int) - absent["frontal"])
        halves = change[:, : SIZE // 2].sum(), change[:, SIZE // 2 :].sum()
        assert halves[half] > 20 * halves[1 - half]


def test_the_middle_and_lower_lobes_differ_in_depth_alone():
    box = {x: boxes(make(Finding("nodule", 0.5, "right", x, seed=3)), SIZE)["nodule"] for x in ("RML", "RLL")}
    assert box["RML"]["lateral"][2] < box["RLL"]["lateral"][0], "anterior is left, posterior is right"
    assert box["RML"]["frontal"][0] < box["RLL"]["frontal"][2]
    assert box["RLL"]["frontal"][0] < box["RML"]["frontal"][2]


def test_films_use_the_whole_range_and_saturate():
    for image in render(make(), SIZE).values():
        assert image.min() == 0
        assert 0.05 < (image == 255).mean() < 0.5


def test_no_patient_is_in_two_splits(truths):
    assert all(len({t.split for t in patient}) == 1 for patient in truths)
    share = Counter(patient[0].split for patient in truths)
    assert [share[split] / len(truths) for split in SPLITS] == [0.7, 0.1, 0.2]


def test_ids_are_unique_and_in_order(truths):
    ids = [t.study_id for patient in truths for t in patient]
    assert len(set(ids)) == len(ids)
    assert ids == sorted(ids)


def test_classes_are_balanced(truths):
    every = [t for patient in truths for t in patient]
    assert 1.3 < len(every) / len(truths) < 1.45
    primary = Counter(t.labels[0] for t in every)
    assert set(primary) == set(FINDINGS)
    assert all(0.08 < n / len(every) < 0.145 for n in primary.values())
    assert 0.22 < np.mean([len(t.labels) > 1 for t in every]) < 0.36
    assert 0.09 < np.mean([not t.lateral for t in every]) < 0.15
    assert all(t.labels == ("no finding",) for t in every if "no finding" in t.labels)


def test_lateral_only_findings_have_a_lateral_view(truths):
    assert all(t.lateral for patient in truths for t in patient if any(f.lateral_only for f in t.findings))


def test_changes_agree_with_severities(truths):
    seen = Counter()
    for patient in truths:
        assert not any(f.change for f in patient[0].findings)
        for before, after in pairwise(patient):
            old = {f.label: f for f in before.findings}
            for f in after.findings:
                seen[f.change] += 1
                if f.change == "new":
                    assert f.label not in old
                    continue
                rise = f.severity - old[f.label].severity
                assert {"stable": rise == 0, "worsened": rise > 0.2, "improved": rise < -0.2}[f.change]
                assert (f.side, f.lobe, f.seed) == (old[f.label].side, old[f.label].lobe, old[f.label].seed)
            assert {f.label for f in after.resolved} == old.keys() - {f.label for f in after.findings}
    assert min(seen[x] for x in ("new", "improved", "stable", "worsened")) > 50


MENTIONS = {
    "cardiomegaly": r"cardiomegaly|\bCM\b|enlarge|cardiothoracic",
    "pleural effusion": r"effusion|fluid with|pleural fluid|costophrenic|hemidiaphragm",
    "pneumothorax": r"pneumothorax|\bPTX\b|rim of air|pleural line",
    "consolidation": r"consolidation|opacity",
    "edema": r"edema|\bCHF\b|interstitial",
    "nodule": r"nodule|lesion",
    "support devices": r"pacemaker|endotracheal|\bETT\b|\btube\b|intubated|central line|catheter|generator|leads",
    "fracture": r"fracture|loss of height|height loss",
}
NEGATED = r"^(\d\. )?(No |There is no )|has resolved|resolution of|has been removed"


def sentences(report: str) -> list[str]:
    found = re.findall(r"(?im)^(?:findings|impression):\s*(.*)$", report)
    return [s for text in found for s in re.split(r"(?<=\w[.)])\s+(?=[A-Z])|(?<=___\.)\s+", text)]


def affirmed(report: str) -> set[str]:
    lines = [s for s in sentences(report) if not re.search(NEGATED, s)]
    return {label for label, words in MENTIONS.items() if any(re.search(words, s) for s in lines)}


def denied(report: str) -> set[str]:
    lines = [s for s in sentences(report) if re.search(NEGATED, s)]
    return {label for label, words in MENTIONS.items() if any(re.search(words, s) for s in lines)}


def test_reports_name_exactly_the_findings_present(truths):
    for truth in (t for patient in truths for t in patient):
        report, present = write_report(truth), set(truth.labels) - {"no finding"}
        assert affirmed(report) == present, report
        assert not denied(report) & present, report


def test_reports_agree_on_side_lobe_and_course(truths):
    words = {"left": "left", "right": "right", "bilateral": "bilateral|both"}
    lobes = {
        "RUL": "right upper lobe",
        "RML": "right middle lobe",
        "RLL": "right lower lobe",
        "LUL": "left upper lobe",
        "LLL": "left lower lobe",
    }
    courses = {
        "new": r"[Nn]ew|not present previously|development",
        "improved": "improve|decreased",
        "worsened": "increased|[Ww]orse",
        "stable": "[Uu]nchanged|Stable|not significantly changed",
    }
    for truth in (t for patient in truths for t in patient if len(t.findings) == 1 and not t.resolved):
        report, (finding,) = write_report(truth), truth.findings
        text = " ".join(s for s in sentences(report) if not re.search(NEGATED, s))
        for lobe, spelled in lobes.items():
            assert (lobe in text or spelled in text) == (lobe == finding.lobe), report
        if finding.label in ("pleural effusion", "pneumothorax"):
            assert {x for x, pattern in words.items() if re.search(rf"\b({pattern})\b", text)} == {finding.side}, report
        assert {x for x, p in courses.items() if re.search(p, text)} == ({finding.change} if finding.change else set())


def test_only_followups_speak_of_a_prior(truths):
    for patient in truths:
        assert not re.search("prior|previous|[Ii]nterval|unchanged", write_report(patient[0]))


def test_reports_vary_and_have_a_readable_length(truths):
    reports = [write_report(t) for patient in truths for t in patient]
    assert len(set(reports)) > 0.95 * len(reports)
    lengths = [len(" ".join(sentences(r)).split()) for r in reports]
    assert 30 <= np.median(lengths) <= 60
    assert all(re.search("(?i)^impression:", r, re.M) for r in reports)
    assert 0.05 < np.mean([not re.search("(?i)^findings:", r, re.M) for r in reports]) < 0.2
