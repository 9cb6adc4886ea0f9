"""3-D chests of ellipsoids, and their radiographs as exact line integrals.

World axes in millimetres: x to the patient's left (the frontal image's right), y down, z to the back. The beam is
parallel: the frontal view looks along z (columns x), the lateral view along x (columns z). Densities add up and are
relative to water.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

FIELD = 350.0  # side of the square detector, mm
FRONTAL, LATERAL = 2, 0  # the world axis along the beam
SIDES = {"right": -1.0, "left": 1.0}
LUNG = -0.74  # density of aerated lung relative to the tissue it replaces
BONE = 1.25
_INFINITE = (math.inf, math.inf, math.inf)
_MINUS_INFINITE = (-math.inf, -math.inf, -math.inf)


def rotation(x: float = 0.0, y: float = 0.0, z: float = 0.0) -> np.ndarray:
    """Rotation matrix [3, 3] for angles in degrees about the x axis, then y, then z."""
    (cx, sx), (cy, sy), (cz, sz) = ((math.cos(a), math.sin(a)) for a in map(math.radians, (x, y, z)))
    return np.array(
        [
            [cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx],
            [sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx],
            [-sy, cy * sx, cy * cx],
        ]
    )


@dataclass(frozen=True)
class Ellipsoid:
    """The points p with |diag(1 / radii) turnᵀ (p - centre)| ≤ 1; lengths in mm, `turn` a rotation [3, 3] or None."""

    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    turn: np.ndarray | None = None

    @cached_property
    def form(self) -> list[list[float]]:
        """The matrix A [3][3] of (p - centre)ᵀ A (p - centre) ≤ 1."""
        return self._spread(-2)

    @cached_property
    def reach(self) -> tuple[float, float, float]:
        """Half extent along each world axis, mm."""
        spread = self._spread(2)
        return tuple(math.sqrt(spread[i][i]) for i in range(3))

    def _spread(self, power: int) -> list[list[float]]:
        if self.turn is None:
            return [[self.radii[i] ** power if i == j else 0.0 for j in range(3)] for i in range(3)]
        return ((self.turn * np.array(self.radii, float) ** power) @ self.turn.T).tolist()

    def scaled(self, factor: float, about: tuple[float, float, float] | None = None) -> "Ellipsoid":
        """The ellipsoid shrunk or grown about a point (its centre by default)."""
        about = about or self.centre
        centre = tuple(a + factor * (c - a) for a, c in zip(about, self.centre, strict=True))
        return Ellipsoid(centre, tuple(factor * r for r in self.radii), self.turn)

    def at(self, x: float, y: float, z: float) -> tuple[float, float, float]:
        """A point given in units of the half extents from the centre."""
        return tuple(c + f * r for c, f, r in zip(self.centre, (x, y, z), self.reach, strict=True))


@dataclass(frozen=True)
class Solid:
    """Uniform density on the points that lie in all of `inside`, in none of `minus`, and between `low` and `high`."""

    density: float
    inside: tuple[Ellipsoid, ...]
    minus: tuple[Ellipsoid, ...] = ()
    low: tuple[float, float, float] = _MINUS_INFINITE
    high: tuple[float, float, float] = _INFINITE


def _chord(body: Ellipsoid, axis: int, across: int, rows: np.ndarray, columns: np.ndarray):
    """Where rays along `axis` enter and leave: two arrays [rows, columns], equal where a ray misses."""
    form, (y0, u0, t0) = body.form, (body.centre[i] for i in (1, across, axis))
    dy, du = (rows - y0)[:, None], (columns - u0)[None, :]
    tt, ty, tu = form[axis][axis], form[axis][1], form[axis][across]
    # A ray solves a quadratic in t; the discriminant is the form left after t is eliminated (a Schur complement).
    yy, uu = form[1][1] - ty * ty / tt, form[across][across] - tu * tu / tt
    room = (1.0 - yy * dy * dy) - uu * du * du
    yu = form[1][across] - ty * tu / tt
    if yu:
        room -= (2.0 * yu * dy) * du
    half = np.sqrt(np.maximum(room, 0.0, out=room) / tt)
    middle = (t0 - ty / tt * dy) - tu / tt * du
    return middle - half, middle + half


def _outside(enter: np.ndarray, leave: np.ndarray, minus: list) -> np.ndarray:
    """Length of the interval [enter, leave] not covered by the intervals of `minus`, by inclusion and exclusion."""
    if not minus:
        return np.maximum(leave - enter, 0.0)
    (lo, hi), *rest = minus
    return _outside(enter, leave, rest) - _outside(np.maximum(enter, lo), np.minimum(leave, hi), rest)


def project(
    solids: list[Solid], axis: int, rows: np.ndarray, columns: np.ndarray, onto: np.ndarray | None = None
) -> np.ndarray:
    """Line integrals of density along world axis `axis` (FRONTAL or LATERAL).

    Args:
        rows: ascending y of the rays in mm, float [H].
        columns: ascending x (frontal) or z (lateral) of the rays in mm, float [W].
        onto: float32 [H, W], what other solids gave before these; None for nothing.

    Returns:
        float32 [H, W], millimetres of water.
    """
    across = 2 - axis
    image = np.zeros((len(rows), len(columns)), np.float32) if onto is None else onto.copy()
    rows, columns = rows.astype(np.float32), columns.astype(np.float32)
    for solid in solids:
        low, high = list(solid.low), list(solid.high)
        for i in range(3):
            low[i] = max(low[i], *(e.centre[i] - e.reach[i] for e in solid.inside))
            high[i] = min(high[i], *(e.centre[i] + e.reach[i] for e in solid.inside))
        top, bottom = rows.searchsorted((low[1], high[1]))
        first, last = columns.searchsorted((low[across], high[across]))
        if top >= bottom or first >= last:
            continue
        window = (axis, across, rows[top:bottom], columns[first:last])
        enter, leave = low[axis], high[axis]
        for body in solid.inside:
            lo, hi = _chord(body, *window)
            enter, leave = np.maximum(enter, lo), np.minimum(leave, hi)
        minus = [
            _chord(body, *window)
            for body in solid.minus
            if all(
                body.centre[i] - body.reach[i] < high[i] and body.centre[i] + body.reach[i] > low[i] for i in range(3)
            )
        ]
        image[top:bottom, first:last] += solid.density * _outside(enter, leave, minus)
    return image


@dataclass(frozen=True)
class Body:
    """What stays the same in one patient. Factors are about 1; lengths in mm."""

    scale: float
    width: float
    depth: float
    heart: float  # cardiothoracic ratio without disease
    heart_height: float
    kyphosis: float
    breast: float  # radius, 0 for none
    rib_tilt: float  # degrees
    dome: float  # how much higher the right diaphragm stands
    seed: int  # lung markings

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Body":
        return cls(
            scale=rng.uniform(0.93, 1.07),
            width=rng.uniform(0.94, 1.06),
            depth=rng.uniform(0.93, 1.08),
            heart=rng.uniform(0.41, 0.47),
            heart_height=rng.uniform(0.94, 1.06),
            kyphosis=rng.uniform(8, 24),
            breast=rng.uniform(30, 48) if rng.random() < 0.5 else 0.0,
            rib_tilt=rng.uniform(14, 24),
            dome=rng.uniform(4, 14),
            seed=int(rng.integers(2**31)),
        )


@dataclass(frozen=True)
class Pose:
    """What differs between two studies of one patient."""

    frontal_shift: float = 0.0  # of the detector's columns, mm
    lateral_shift: float = 0.0
    vertical_shift: float = 0.0  # the same in both views, so that heights agree
    magnification: float = 1.0
    inspiration: float = 0.0  # how far the diaphragm stands below its mean, mm
    exposure: float = 1.0
    contrast: float = 1.0

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Pose":
        return cls(
            frontal_shift=rng.uniform(-6, 6),
            lateral_shift=rng.uniform(-8, 8),
            vertical_shift=rng.uniform(-6, 6),
            magnification=rng.uniform(0.97, 1.03),
            inspiration=rng.uniform(-5, 5),
            exposure=rng.uniform(0.95, 1.05),
            contrast=rng.uniform(0.95, 1.05),
        )

    def rays(self, axis: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows' y and the columns' x or z in mm: two float64 [size] arrays of pixel centres."""
        ticks = ((np.arange(size) + 0.5) / size - 0.5) * FIELD / self.magnification
        return ticks + self.vertical_shift, ticks + (self.frontal_shift if axis == FRONTAL else self.lateral_shift)


@dataclass
class Chest:
    """A chest ready to project: every solid, and the organs that findings refer to."""

    solids: list[Solid]
    heart: Ellipsoid
    mediastinum: Ellipsoid
    lungs: dict[str, Ellipsoid]
    domes: dict[str, Ellipsoid]
    hila: dict[str, tuple[float, float, float]]
    spine: list[tuple[float, float, float]] = field(default_factory=list)

    @property
    def thoracic_width(self) -> float:
        """Inner width of the rib cage, mm."""
        return sum(abs(lung.centre[0]) + lung.reach[0] for lung in self.lungs.values())

    def in_lung(
        self,
        side: str,
        density: float,
        *shapes: Ellipsoid,
        minus: tuple[Ellipsoid, ...] = (),
        low: tuple[float, float, float] = _MINUS_INFINITE,
        high: tuple[float, float, float] = _INFINITE,
    ) -> Solid:
        """The part of one lung within all `shapes`: never in the heart, mediastinum or diaphragm."""
        organs = (self.domes[side], self.heart, self.mediastinum)
        return Solid(density, (self.lungs[side], *shapes), (*minus, *organs), low, high)


def needle(start: tuple[float, ...], end: tuple[float, ...], radius: float) -> Ellipsoid:
    """A thin ellipsoid of revolution from one point to another."""
    start, end = np.array(start), np.array(end)
    length = float(np.linalg.norm(end - start))
    along = (end - start) / length
    other = _cross(along, (0.0, 0.0, 1.0) if abs(along[2]) < 0.9 else (1.0, 0.0, 0.0))
    other /= np.linalg.norm(other)
    turn = np.stack([along, other, _cross(along, other)], axis=1)
    return Ellipsoid(tuple(((start + end) / 2).tolist()), (length / 2, radius, radius), turn)


def _cross(a: Sequence[float], b: Sequence[float]) -> np.ndarray:
    """np.cross, which takes ten times as long for one pair of vectors."""
    (ax, ay, az), (bx, by, bz) = map(float, a), map(float, b)
    return np.array([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx])


def build_chest(
    body: Body,
    pose: Pose,
    *,
    heart: float | None = None,
    collapsed: dict[str, float] | None = None,
    crushed: dict[int, float] | None = None,
) -> Chest:
    """The chest of one patient in one study.

    Args:
        heart: cardiothoracic ratio, the patient's own when None.
        collapsed: side to the fraction of its size that a lung has shrunk to.
        crushed: index of a vertebra (0 is the top one) to the fraction of its height that is left.
    """
    s, w, d = body.scale, body.scale * body.width, body.scale * body.depth
    collapsed, crushed = collapsed or {}, crushed or {}
    lungs, domes, hila = {}, {}, {}
    for side, sign in SIDES.items():
        lungs[side] = Ellipsoid((sign * 73 * w, 20 * s, 0), (60 * w, 158 * s, 90 * d), rotation(z=sign * -5))
        top = 66 * s + pose.inspiration + (0.0 if side == "right" else body.dome)
        domes[side] = Ellipsoid((sign * 70 * w, top + 76 * s, -18 * d), (66 * w, 76 * s, 84 * d))
        hila[side] = (sign * 30 * w, -18 * s, 6 * d)
    mediastinum = Ellipsoid((0, 0, 2 * d), (30 * w, 175 * s, 62 * d))
    chest = Chest([], mediastinum, mediastinum, lungs, domes, hila)
    half = (heart or body.heart) * chest.thoracic_width / 2
    # The heart rests on the diaphragm, two thirds of it left of the midline; it grows to the left and downwards.
    grown = half / (0.44 * chest.thoracic_width / 2)
    height = 58 * s * body.heart_height * (0.6 + 0.4 * grown)
    heart_x, heart_z = 0.36 * half, -26 * d + 4 * (grown - 1) * d
    # `half` is the reach along x, which a tilted ellipsoid has at other radii: solve for the long one.
    tilt = math.radians(28)
    long = math.sqrt(max(half**2 - (height * math.sin(tilt)) ** 2, (0.5 * half) ** 2)) / math.cos(tilt)
    chest.heart = Ellipsoid(
        (heart_x, 72 * s + pose.inspiration - 0.88 * height, heart_z),
        (long, height, 44 * d * (0.7 + 0.3 * grown)),
        rotation(z=28),
    )
    add = chest.solids.append
    add(Solid(1.0, (Ellipsoid((0, 48 * s, 0), (166 * w, 222 * s, 114 * d)),)))
    add(Solid(1.0, (Ellipsoid((0, -205 * s, 10 * d), (52 * w, 75 * s, 50 * d)),)))
    for side, sign in SIDES.items():
        shoulder = Ellipsoid((sign * 118 * w, -140 * s, 8 * d), (90 * w, 42 * s, 58 * d), rotation(z=sign * 24))
        add(Solid(0.5, (shoulder,)))
        add(chest.in_lung(side, LUNG))
        add(Solid(0.35, (domes[side],)))
        if body.breast:
            breast = Ellipsoid((sign * 80 * w, 66 * s, -86 * d), (body.breast * 1.3, body.breast, 40))
            add(Solid(0.4, (breast,)))
    add(Solid(0.06, (mediastinum,)))
    add(Solid(0.12, (chest.heart,)))
    add(Solid(-0.9, (Ellipsoid((2, -118 * s, 18 * d), (9 * s, 75 * s, 10 * s), rotation(x=-6)),)))
    _skeleton(chest, body, s, w, d, crushed)
    _vessels(chest, body, collapsed)
    return chest


def _skeleton(chest: Chest, body: Body, s: float, w: float, d: float, crushed: dict[int, float]) -> None:
    add = chest.solids.append
    for i in range(16):
        y = (-172 + 24 * i) * s
        z = 54 * d + body.kyphosis * (1 - ((y + 10) / (120 * s)) ** 2)
        half, size = (8.6 + 0.1 * i) * s, 0.88 + 0.02 * i
        chest.spine.append((0.0, y, z))
        left = crushed.get(i, 1.0)
        # A crushed body is flatter, wider to the front, and denser: impacted, then sclerotic.
        vertebra = Ellipsoid((0, y, z - 6 * (1 - left)), (21 * size * s, 18 * s, 17 * size * s * (1.3 - 0.3 * left)))
        floor = y + half
        add(
            Solid(
                1.15 / left**2,
                (vertebra,),
                low=(-math.inf, floor - 2 * half * left, -math.inf),
                high=(math.inf, floor, math.inf),
            )
        )
        add(Solid(0.8, (Ellipsoid((0, y + 8 * s, z + 27 * s), (5 * s, 8 * s, 13 * s), rotation(x=-30)),)))
    for sign in SIDES.values():
        for i in range(10):
            y = (-118 + 23 * i) * s
            narrow = math.sqrt(max(1 - ((y - 25 * s) / (168 * s)) ** 2, 0.1))
            turn = rotation(z=sign * 12) @ rotation(x=-body.rib_tilt - i)
            wide, deep = (136 * w + 5) * narrow, 98 * d * narrow + 4
            outer = Ellipsoid((0, y, 2), (wide, 7 * s, deep), turn)
            inner = Ellipsoid((0, y, 2), (wide - 7, 14 * s, deep - 7), turn)
            low, high = (
                (0 if sign > 0 else -math.inf, -math.inf, -60 * d),
                (math.inf if sign > 0 else 0, math.inf, math.inf),
            )
            add(Solid(BONE, (outer,), (inner,), low, high))
        add(Solid(0.9, (needle((sign * 14 * w, -104 * s, -72 * d), (sign * 150 * w, -136 * s, -20 * d), 6.5 * s),)))
        add(
            Solid(0.9, (Ellipsoid((sign * 128 * w, -80 * s, 84 * d), (26, 58, 4), rotation(y=sign * 35, z=sign * 12)),))
        )
    add(Solid(0.6, (Ellipsoid((0, -10 * s, -96 * d), (16, 80 * s, 6), rotation(x=6)),)))


def _vessels(chest: Chest, body: Body, collapsed: dict[str, float]) -> None:
    rng = np.random.default_rng(body.seed)
    for side, sign in SIDES.items():
        lung, hilum, shrink = chest.lungs[side], chest.hila[side], collapsed.get(side, 1.0)
        chest.solids.append(Solid(0.35, (Ellipsoid(hilum, (13, 24, 16), rotation(z=sign * 10)),)))
        for _ in range(18):
            target = lung.at(sign * rng.uniform(-0.1, 0.8), rng.uniform(-0.72, 0.38), rng.uniform(-0.6, 0.65))
            reach, radius = rng.uniform(0.6, 0.95) * shrink, rng.uniform(2.2, 3.6)
            tip = tuple(h + reach * (t - h) for h, t in zip(hilum, target, strict=True))
            root = tuple(h + rng.uniform(-12, 12) for h in hilum)
            chest.solids.append(Solid(0.75, (needle(root, tip, radius),)))


def film(integrals: np.ndarray, axis: int, body: Body, pose: Pose, seed: int | None) -> np.ndarray:
    """The digital film: attenuation, photon noise, logarithm, window. Air is dark; what saturates is 255.

    Args:
        integrals: millimetres of water, float [H, W].
        seed: of the detector noise; None for a film without.

    Returns:
        uint8 [H, W].
    """
    attenuation, photons = 0.02, 9e4  # per mm; photons a pixel in open air
    counts = photons * np.exp(-attenuation * integrals)
    if seed is not None:
        noise = np.random.default_rng((seed, axis)).standard_normal(counts.shape, dtype=np.float32)
        counts = np.maximum(counts + np.sqrt(counts) * noise, 1.0)
    measured = np.log(photons / counts) / attenuation
    # Automatic exposure: the window follows the size of the body, never the findings.
    low, high = (36.0, 180.0) if axis == FRONTAL else (70.0, 300.0)
    thick = body.scale * (body.depth if axis == FRONTAL else body.width) * pose.exposure
    low, high = low * thick, (low + (high - low) * pose.contrast) * thick
    return np.round(255 * np.clip((measured - low) / (high - low), 0, 1) ** 0.9).astype(np.uint8)
