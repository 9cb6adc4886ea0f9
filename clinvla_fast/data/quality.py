"""Whether a film is fit to learn from: over-exposed, blank and motion-blurred ones are told by what is measured.

ClinVLA (section 4.1.1) discards 3.2% of its films for motion artefacts or over-exposure without saying how. The
measures here are made on the film squeezed to 256 x 256 pixels, whatever its file's resolution was:

- white, black: the shares of pixels at 250 or more, and at 5 or less (of 255). A film is over-exposed where one of them
  saturates most of it. Which end that is depends on the detector and its window.
- contrast: standard deviation, in gray levels, of the means of 16 x 16 equal blocks. Noise averages out of them.
- sharpness: motion over a length L multiplies the spectrum by sinc(L f) along its direction, so it wipes out what is
  finer than L there and leaves the other direction alone. With P(band, sector) the mean power in a band of spatial
  frequencies (cycles a side) and one of 12 sectors of directions, under a Hann window,

      sharpness = (mean of the three least P(17 to 29) - median of P(77 to 100)) / median of P(5 to 15)

  The first band holds details of 3 to 6% of the side, the second is noise, which motion does not blur, and the third
  is anatomy, which sets the scale. The ratio of fine to coarse spectral power is a usual measure of focus (operators of
  this and other kinds: Pertuz et al. 2013, Pattern Recognition 46); taking the worst directions makes it one of motion.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

_SIDE = 256
_SECTORS = 12
_BANDS = ((5, 15), (17, 29), (77, 100))  # cycles a side: anatomy, details, noise


@dataclass(frozen=True)
class Quality:
    """Limits on what `quality_scores` measures; a film beyond one of them is dropped. 1, 1, 0 and 0 drop nothing.

    The defaults were set on one real film (pydicom-data's RG1), phantoms, and both degraded in known ways
    (tests/data/test_quality.py): look at the scores of a few hundred films of your own before you rely on them.
    """

    white: float = 0.5
    """Largest share of pixels at 250 or more, of 255."""
    black: float = 0.85
    """Largest share of pixels at 5 or less. Air and a collimator's shutters are black on sound films."""
    contrast: float = 5.0
    """Least standard deviation of the means of 16 x 16 blocks, in gray levels: less is blank."""
    sharpness: float = 0.0045
    """Least sharpness in the worst directions. Motion over 5% of the side or more leaves less."""

    def reason(self, image: np.ndarray) -> str:
        """Why the film (uint8 [H, W]) is to be dropped: "over-exposed", "blank image", "motion-blurred"; else ""."""
        scores = quality_scores(image)
        if scores["white"] > self.white or scores["black"] > self.black:
            return "over-exposed"
        if scores["contrast"] < self.contrast:
            return "blank image"
        return "motion-blurred" if scores["sharpness"] < self.sharpness else ""


def quality_scores(image: np.ndarray) -> dict[str, float]:
    """The white, black, contrast and sharpness of a film (uint8 [H, W], at least 128 pixels a side).

    Smaller ones lack the details that sharpness is about, and score as blurred.
    """
    square = np.asarray(Image.fromarray(image).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR))
    window, bins, counts = _spectrum()
    counted = np.bincount(square.ravel(), minlength=256) / square.size
    blocks = square.reshape(16, _SIDE // 16, 16, _SIDE // 16).mean((1, 3))
    values = square.astype(np.float32)
    values = (values - np.vdot(values, window) / window.sum()) * window
    spectrum = np.fft.rfft2(values)
    power = spectrum.real**2 + spectrum.imag**2
    powers = np.bincount(bins, power.ravel(), minlength=len(counts))[:-1] / counts[:-1]
    anatomy, details, noise = powers.reshape(len(_BANDS), _SECTORS)
    scale = np.median(anatomy)
    return {
        "white": float(counted[250:].sum()),
        "black": float(counted[:6].sum()),
        "contrast": float(blocks.std()),
        "sharpness": float((np.sort(details)[:3].mean() - np.median(noise)) / scale) if scale > 0 else 0.0,
    }


@cache
def _spectrum() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The window [S, S], the number of each frequency's band and sector [S * (S / 2 + 1)], how many have each."""
    y, x = np.meshgrid(np.fft.fftfreq(_SIDE) * _SIDE, np.fft.rfftfreq(_SIDE) * _SIDE, indexing="ij")
    frequency, direction = np.hypot(x, y), np.arctan2(y, x) / np.pi % 1
    sector = np.rint(direction * _SECTORS).astype(int) % _SECTORS
    bins = np.full(frequency.shape, len(_BANDS) * _SECTORS)
    for band, (low, high) in enumerate(_BANDS):
        inside = (frequency >= low) & (frequency < high)
        bins[inside] = band * _SECTORS + sector[inside]
    window = np.hanning(_SIDE).astype(np.float32)
    return np.outer(window, window), bins.ravel(), np.bincount(bins.ravel())
