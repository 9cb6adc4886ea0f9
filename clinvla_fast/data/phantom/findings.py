"""What is wrong with a phantom patient: findings in 3-D, their course over studies, and the images they give."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np

from clinvla_fast.data.phantom.anatomy import (
    FRONTAL,
    LATERAL,
    SIDES,
    Body,
    Chest,
    Ellipsoid,
    Pose,
    Solid,
    build_chest,
    film,
    needle,
    project,
)

NO_FINDING = "no finding"
FINDINGS = (
    NO_FINDING,
    "cardiomegaly",
    "pleural effusion",
    "pneumothorax",
    "consolidation",
    "edema",
    "nodule",
    "support devices",
    "fracture",
)
# Centres in half extents of the lung: away from the midline, down, to the back.
LOBES = {
    "RUL": (0.05, -0.50, -0.05),
    "RML": (0.10, 0.12, -0.50),
    "RLL": (0.15, 0.18, 0.45),
    "LUL": (0.10, -0.44, -0.10),
    "LLL": (0.35, 0.18, 0.45),
}
VERTEBRAE = {"T7": 7, "T8": 8, "T9": 9}
POSTERIOR = "posterior"
_SPLITS = ("train", "train", "test", "train", "train", "validate", "train", "test", "train", "train")
_WATER_IN_LUNG = 0.78


@dataclass(frozen=True)
class Finding:
    """One finding of one study.

    Attributes:
        label: one of FINDINGS, never "no finding".
        severity: 0 to 1; 0.5 for support devices, which have none.
        side: "left", "right", "bilateral" or "".
        lobe: a key of LOBES for consolidation and nodule.
        kind: the device; the vertebra of a fracture; "posterior" for an effusion that only the lateral view shows.
        change: against the previous study, "new", "improved", "stable" or "worsened"; "" in a first study.
        seed: of the shape, kept from study to study.
    """

    label: str
    severity: float = 0.5
    side: str = ""
    lobe: str = ""
    kind: str = ""
    change: str = ""
    seed: int = 0

    @property
    def lateral_only(self) -> bool:
        return self.label == "fracture" or self.kind == POSTERIOR

    @property
    def sides(self) -> tuple[str, ...]:
        return tuple(SIDES) if self.side == "bilateral" else (self.side,)

    @property
    def diameter(self) -> float:
        """Of a nodule, mm."""
        return 26.0 + 24.0 * self.severity

    @property
    def height_left(self) -> float:
        """Of a crushed vertebra, as a fraction of the healthy one."""
        return 0.62 - 0.37 * self.severity

    @property
    def heart_ratio(self) -> float:
        """Cardiothoracic ratio of a cardiomegaly."""
        return 0.55 + 0.12 * self.severity


@dataclass(frozen=True)
class StudyTruth:
    """Everything that one study shows; images and report are functions of it. The primary finding comes first."""

    study_id: str
    patient_id: str
    split: str
    body: Body
    pose: Pose
    findings: tuple[Finding, ...]
    resolved: tuple[Finding, ...]  # of the previous study, gone in this one
    followup: bool
    lateral: bool
    seed: int

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(f.label for f in self.findings) or (NO_FINDING,)


def draw_finding(rng: np.random.Generator, label: str) -> Finding:
    """A finding with random place, size and severity."""
    severity, seed = rng.uniform(0.1, 0.95), int(rng.integers(2**31))
    side = "left" if rng.random() < 0.5 else "right"
    finding = Finding(label, round(severity, 3), seed=seed)
    match label:
        case "pleural effusion":
            if rng.random() < 0.2:
                return replace(finding, side=side, kind=POSTERIOR, severity=round(0.1 + 0.22 * severity, 3))
            return replace(finding, side="bilateral" if rng.random() < 0.3 else side)
        case "pneumothorax":
            return replace(finding, side=side)
        case "consolidation" | "nodule":
            lobe = str(rng.choice(list(LOBES)))
            return replace(finding, lobe=lobe, side="right" if lobe[0] == "R" else "left")
        case "edema":
            return replace(finding, side="bilateral")
        case "support devices":
            kind = ("pacemaker", "endotracheal tube", "central line")[rng.integers(3)]
            side = {"pacemaker": "left", "central line": "right"}.get(kind, "")
            return replace(finding, kind=kind, side=side, severity=0.5)
        case "fracture":
            return replace(finding, kind=str(rng.choice(list(VERTEBRAE))))
    return finding


def _next(rng: np.random.Generator, finding: Finding) -> Finding:
    """The same finding in the following study."""
    courses = ["stable"]
    if finding.label != "support devices":
        if finding.severity <= 0.7:
            courses.append("worsened")
        if finding.severity >= 0.35 and finding.label != "fracture":
            courses.append("improved")
    course = courses[rng.integers(len(courses))]
    if course == "stable":
        return replace(finding, change=course)
    step = rng.uniform(0.25, 0.45) * (1 if course == "worsened" else -1)
    # A posterior effusion that grows is an ordinary one.
    return replace(
        finding,
        change=course,
        severity=round(float(np.clip(finding.severity + step, 0.05, 1)), 3),
        kind="" if finding.kind == POSTERIOR else finding.kind,
    )


def _follow(rng: np.random.Generator, previous: tuple[Finding, ...]) -> tuple[Finding, ...]:
    """The findings of the study after one with the findings `previous`, primary first.

    The primary label stays with one fixed probability whatever it is, and is otherwise uniform: classes stay balanced.
    """
    before = {f.label: f for f in previous}
    primary = previous[0].label if previous else NO_FINDING
    if rng.random() > 0.6:
        primary = FINDINGS[rng.integers(len(FINDINGS))]
    if primary == NO_FINDING and "fracture" in before:  # a crushed vertebra stays crushed
        primary = "fracture"
    if primary == NO_FINDING:
        return ()
    chosen = [primary]
    others = [f.label for f in previous if f.label != primary and (f.label == "fracture" or rng.random() < 0.4)]
    others.sort(key=lambda label: label != "fracture")
    if not others and rng.random() < 0.12:
        others = [str(rng.choice([x for x in FINDINGS[1:] if x != primary]))]
    chosen += others[:1]
    return tuple(_next(rng, before[x]) if x in before else replace(draw_finding(rng, x), change="new") for x in chosen)


def patient_split(patient: int) -> str:
    """The split that a patient's studies are in."""
    return _SPLITS[patient % len(_SPLITS)]


def patient_truths(seed: int, patient: int) -> list[StudyTruth]:
    """The one to three studies of one patient, in time order; a pure function of its arguments."""
    rng = np.random.default_rng((seed, patient))
    body = Body.draw(rng)
    studies: list[StudyTruth] = []
    for number in range(1, 2 + rng.choice(3, p=(0.7, 0.25, 0.05))):
        if studies:
            findings = _follow(rng, studies[-1].findings)
        else:
            labels = [FINDINGS[rng.integers(len(FINDINGS))]]
            if labels[0] != NO_FINDING and rng.random() < 0.3:
                labels.append(str(rng.choice([x for x in FINDINGS[1:] if x != labels[0]])))
            findings = tuple(draw_finding(rng, x) for x in labels if x != NO_FINDING)
        present = {f.label for f in findings}
        no_lateral = rng.random() < 0.145
        studies.append(
            StudyTruth(
                study_id=f"phantom-{patient:06d}-{number}",
                patient_id=f"phantom-{patient:06d}",
                split=patient_split(patient),
                body=body,
                pose=Pose.draw(rng),
                findings=findings,
                resolved=tuple(f for f in studies[-1].findings if f.label not in present) if studies else (),
                followup=bool(studies),
                lateral=any(f.lateral_only for f in findings) or not no_lateral,
                seed=int(rng.integers(2**31)),
            )
        )
    return studies


def _effusion(finding: Finding, chest: Chest) -> list[Solid]:
    solids = []
    for side in finding.sides:
        dome, lung, sign = chest.domes[side], chest.lungs[side], SIDES[side]
        top = dome.centre[1] - dome.reach[1]
        if finding.kind == POSTERIOR:
            # Behind the dome and below its top: in the frontal view the abdomen in front saturates the film.
            near, far = sorted((sign * 32.0, sign * 84.0))
            low, high = (near, top + 32 - 24 * finding.severity, 12.0), (far, math.inf, math.inf)
            solids.append(chest.in_lung(side, 1.3, low=low, high=high))
            continue
        level = top + 18 - (0.12 + 0.5 * finding.severity) * 200
        # The meniscus: air fills a bowl, so fluid stands higher along the chest wall.
        bowl = Ellipsoid((lung.centre[0] - sign * 6, level - 45, 0), (70, 45, 105))
        solids.append(chest.in_lung(side, _WATER_IN_LUNG, minus=(bowl,), low=(-math.inf, level - 32, -math.inf)))
    return solids


def _shrunken(finding: Finding) -> float:
    return 0.84 - 0.28 * finding.severity


def _pneumothorax(finding: Finding, chest: Chest) -> list[Solid]:
    sign, lung = SIDES[finding.side], chest.lungs[finding.side]
    inner = lung.scaled(_shrunken(finding), about=(sign * 30, 45, 0))
    return [
        chest.in_lung(finding.side, -0.26, minus=(inner,)),
        chest.in_lung(finding.side, 0.10, inner),
        chest.in_lung(finding.side, 0.9, inner, minus=(inner.scaled(0.965),)),  # the visceral pleura, a thin line
    ]


def _in_lobe(finding: Finding, chest: Chest, *, jitter: tuple[float, float, float]) -> tuple[float, float, float]:
    away, down, back = (c + j for c, j in zip(LOBES[finding.lobe], jitter, strict=True))
    return chest.lungs[finding.side].at(SIDES[finding.side] * away, down, back)


def _consolidation(finding: Finding, chest: Chest) -> list[Solid]:
    rng = np.random.default_rng(finding.seed)
    fissure = chest.lungs[finding.side].at(0, -0.16, 0)[1]
    low = (-math.inf, fissure if finding.lobe == "RML" else -math.inf, -math.inf)
    high = (math.inf, fissure if finding.lobe == "RUL" else math.inf, math.inf)
    solids = []
    for _ in range(5):
        centre = _in_lobe(finding, chest, jitter=tuple(rng.uniform(-0.2, 0.2, 3) * (1.0, 0.5, 1.0)))
        radii = tuple(float(r) for r in rng.uniform(0.8, 1.2, 3) * (26 + 20 * finding.severity))
        solids.append(
            chest.in_lung(finding.side, 0.19 + 0.08 * finding.severity, Ellipsoid(centre, radii), low=low, high=high)
        )
    return solids


def _edema(finding: Finding, chest: Chest) -> list[Solid]:
    rng = np.random.default_rng(finding.seed)
    solids = []
    for side, sign in SIDES.items():
        lung, (x, y, z) = chest.lungs[side], chest.hila[side]
        solids.append(chest.in_lung(side, 0.08 + 0.14 * finding.severity))
        for grow in (0.7, 1.0):
            wing = Ellipsoid((x + sign * 18, y + 14, z), (44 * grow, 68 * grow, 60 * grow))
            solids.append(chest.in_lung(side, 0.14 + 0.18 * finding.severity, wing))
        for _ in range(round(24 + 24 * finding.severity)):
            start = lung.at(*rng.uniform((-0.55, -0.65, -0.6), (0.6, 0.3, 0.6)))
            end = tuple(s + step for s, step in zip(start, rng.normal(0, 8, 3), strict=True))
            solids.append(Solid(1.0, (needle(start, end, 3.0),)))
    return solids


def _nodule(finding: Finding, chest: Chest) -> list[Solid]:
    rng = np.random.default_rng(finding.seed)
    away, down, back = rng.uniform((0.0, -0.1, -0.12), (0.25, 0.06, 0.12))
    x, y, z = _in_lobe(finding, chest, jitter=(away, down, back))
    return [Solid(1.6, (Ellipsoid((x, y, z), (finding.diameter / 2,) * 3),))]


def _line(points: list[tuple[float, float, float]], radius: float, density: float) -> list[Solid]:
    """A wire or tube through `points`; its pieces overlap so that no gap shows."""
    pieces = []
    for start, end in pairwise(points):
        over = [0.2 * (e - s) for s, e in zip(start, end, strict=True)]
        start, end = (
            tuple(p + f * o for p, o in zip(point, over, strict=True)) for point, f in ((start, -1), (end, 1))
        )
        pieces.append(Solid(density, (needle(start, end, radius),)))
    return pieces


def _device(finding: Finding, chest: Chest) -> list[Solid]:
    rng = np.random.default_rng(finding.seed)
    a, b, c = (float(v) for v in rng.uniform(-5, 5, 3))
    hx, hy, hz = chest.heart.centre
    if finding.kind == "pacemaker":
        x, y, z = 92 + a, -84 + b, -72 + c
        generator = Solid(10.0, (Ellipsoid((x, y, z), (24, 19, 6)),))
        vein = [(x - 10, y - 12, z), (70, -112, -50), (44, -116, -30), (18, -96, -12), (-16, -60, -6), (-24, -10, -8)]
        atrium, ventricle = (
            [(-22, 10, -20), (-14, 4, -40)],
            [(-16, 30, -18), (10, hy + 14, hz - 14), (hx + 22, hy + 22, hz - 20)],
        )
        return [
            generator,
            *_line(vein, 2.2, 6.0),
            *_line([vein[-1], *atrium], 2.2, 6.0),
            *_line([vein[-1], *ventricle], 2.2, 6.0),
        ]
    if finding.kind == "endotracheal tube":
        return _line([(1, -190, 2), (1, -150, 12), (1 + a / 4, -110, 17), (1 + a / 3, -66 + b, 22)], 5.5, 9.0)
    neck = [
        (-118, -96 + a, -46),
        (-92, -116, -42),
        (-62, -122 + b, -32),
        (-40, -104, -20),
        (-34, -70, -8),
        (-34, -30, -6),
    ]
    return _line([*neck, (-30, 12 + c, -12)], 3.2, 7.0)


def finding_solids(finding: Finding, chest: Chest) -> list[Solid]:
    """What a finding adds to the chest; nothing for those that change the anatomy itself (`chest_of`)."""
    match finding.label:
        case "pleural effusion":
            return _effusion(finding, chest)
        case "pneumothorax":
            return _pneumothorax(finding, chest)
        case "consolidation":
            return _consolidation(finding, chest)
        case "edema":
            return _edema(finding, chest)
        case "nodule":
            return _nodule(finding, chest)
        case "support devices":
            return _device(finding, chest)
    return []


def chest_of(truth: StudyTruth) -> Chest:
    """The patient's chest with all findings of the study."""
    chest = _anatomy(truth.body, truth.pose, _changed(truth))
    return replace(chest, solids=chest.solids + _added(truth, chest))


def _changed(truth: StudyTruth) -> tuple[Finding, ...]:
    """The findings that change the anatomy itself."""
    return tuple(f for f in truth.findings if f.label in ("cardiomegaly", "fracture", "pneumothorax"))


def _added(truth: StudyTruth, chest: Chest) -> list[Solid]:
    return [solid for finding in truth.findings for solid in finding_solids(finding, chest)]


# The anatomy is most of the work, and a study has it in common with the same study without one of its findings.
@lru_cache(maxsize=4)
def _anatomy(body: Body, pose: Pose, changed: tuple[Finding, ...]) -> Chest:
    findings = {f.label: f for f in changed}
    heart, crushed, collapsed = (findings.get(x) for x in ("cardiomegaly", "fracture", "pneumothorax"))
    return build_chest(
        body,
        pose,
        heart=heart.heart_ratio if heart else None,
        crushed={VERTEBRAE[crushed.kind]: crushed.height_left} if crushed else None,
        collapsed={collapsed.side: _shrunken(collapsed)} if collapsed else None,
    )


@lru_cache(maxsize=8)
def _anatomy_projected(body: Body, pose: Pose, changed: tuple[Finding, ...], axis: int, size: int) -> np.ndarray:
    return project(_anatomy(body, pose, changed).solids, axis, *pose.rays(axis, size))


@lru_cache(maxsize=1)
def _projected(truth: StudyTruth, size: int) -> dict[int, np.ndarray]:
    """The line integrals of each view that was taken, by axis."""
    anatomy = (truth.body, truth.pose, _changed(truth))
    added = _added(truth, _anatomy(*anatomy))
    return {
        axis: project(added, axis, *truth.pose.rays(axis, size), onto=_anatomy_projected(*anatomy, axis, size))
        for axis in ((FRONTAL, LATERAL) if truth.lateral else (FRONTAL,))
    }


def render(truth: StudyTruth, size: int, *, noise: bool = True) -> dict[str, np.ndarray]:
    """The study's own radiographs: uint8 [size, size] under "frontal" and, where it was taken, "lateral"."""
    seed = truth.seed if noise else None
    integrals = _projected(truth, size)
    views = {"frontal": FRONTAL, "lateral": LATERAL}
    return {
        view: film(integrals[axis], axis, truth.body, truth.pose, seed)
        for view, axis in views.items()
        if axis in integrals
    }


def boxes(truth: StudyTruth, size: int) -> dict[str, dict[str, tuple[int, int, int, int] | None]]:
    """Where each finding shows: label to view to (left, top, right, bottom) in pixels, ends excluded.

    A box holds every pixel that would look different without the finding; None where there is no such pixel (hidden
    behind saturated film) or no such view.
    """
    shown = render(truth, size, noise=False)
    result = {}
    for finding in truth.findings:
        without = render(replace(truth, findings=tuple(f for f in truth.findings if f != finding)), size, noise=False)
        result[finding.label] = {view: _box(shown.get(view), without.get(view)) for view in ("frontal", "lateral")}
    return result


def _box(one: np.ndarray | None, other: np.ndarray | None) -> tuple[int, int, int, int] | None:
    if one is None or other is None:
        return None
    rows, columns = np.nonzero(np.abs(one.astype(int) - other) >= 4)
    if not len(rows):
        return None
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
