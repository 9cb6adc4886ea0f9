import importlib.util
import io
from dataclasses import asdict
from functools import cache

import numpy as np
import pytest
from PIL import Image

from clinvla_fast.data.phantom import phantom_studies
from clinvla_fast.data.quality import Quality, quality_scores
from clinvla_fast.data.radiographs import read_radiograph

REAL = ("RG1_UNCR.dcm", "RG1_UNCI.dcm", "RG1_J2KR.dcm", "RG1_J2KI.dcm")


@cache
def real_film(name="RG1_UNCR.dcm", short_side=512):
    if not (importlib.util.find_spec("data_store") and importlib.util.find_spec("pydicom")):
        pytest.skip("needs pydicom and pydicom-data")
    from pydicom.data import get_testdata_file

    return read_radiograph(get_testdata_file(name, download=False), short_side)


@cache
def phantoms(size=256):
    return [image for study in phantom_studies(6, seed=2, size=size) for image in study.images.values()]


def films():
    return [real_film(), *phantoms()[:6]]


def small(image, side=256):
    """uint8 with a short side of `side`, antialiased."""
    image = Image.fromarray(np.rint(np.clip(image, 0, 255)).astype(np.uint8))
    scale = side / min(image.size)
    return np.asarray(image.resize([round(scale * length) for length in image.size], Image.Resampling.BILINEAR))


def moved(image, share, degrees):
    """The mean of `image` along a straight motion of `share` of its short side."""
    length = share * min(image.shape)
    edge = int(length) + 2
    padded = Image.fromarray(np.pad(image, edge, mode="edge").astype(np.float32))
    angle, steps = np.deg2rad(degrees), np.linspace(-length / 2, length / 2, 2 * int(length) + 3)
    shifts = [(1, 0, step * np.cos(angle), 0, 1, step * np.sin(angle)) for step in steps]
    frames = [padded.transform(padded.size, Image.Transform.AFFINE, m, Image.Resampling.BILINEAR) for m in shifts]
    return np.mean([np.asarray(frame) for frame in frames], 0)[edge:-edge, edge:-edge]


def jpeg(image, quality):
    Image.fromarray(image).save(buffer := io.BytesIO(), "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


@pytest.mark.parametrize("short_side", [128, 224, 256, 512])
@pytest.mark.parametrize("name", REAL)
def test_a_sound_film_is_kept(name, short_side):
    assert Quality().reason(real_film(name, short_side)) == ""
    assert Quality().reason(jpeg(real_film(name, short_side), 75)) == ""


@pytest.mark.parametrize("size", [128, 256])
def test_phantoms_are_kept(size):
    assert {Quality().reason(image) for image in phantoms(size)} == {""}


def test_natural_variety_is_kept():
    rng = np.random.default_rng(0)
    for image in films():
        soft = Image.fromarray(image).resize((160, 160), Image.Resampling.BILINEAR).resize((512, 512))
        narrow = image.copy()
        narrow[:, : image.shape[1] // 4] = narrow[: image.shape[0] // 8] = 0
        variants = {
            "soft": np.asarray(soft),
            "noisy": image + rng.normal(0, 8 * min(image.shape) / 512, image.shape),
            "flat": 128 + (image - 128.0) / 3,
            "bright": 255 * (image / 255) ** 0.7,
            "dark": 255 * (image / 255) ** 1.4,
            "narrow": narrow,
            "turned": np.asarray(Image.fromarray(image).rotate(7, Image.Resampling.BILINEAR)),
            "a little motion": moved(image, 0.01, 30),
        }
        found = {name: Quality().reason(small(variant)) for name, variant in variants.items()}
        assert set(found.values()) == {""}, found


@pytest.mark.parametrize("share", [0.05, 0.08, 0.12])
@pytest.mark.parametrize("degrees", range(0, 180, 30))
def test_motion_blur_is_dropped(share, degrees):
    rng = np.random.default_rng(0)
    for image in films():
        blurred = moved(image, share, degrees)
        blurred += rng.normal(0, 6 * min(image.shape) / 512, image.shape)  # noise does not move with the patient
        assert Quality().reason(small(blurred)) == "motion-blurred"


def test_sharpness_falls_with_the_length_of_the_motion():
    scores = [
        quality_scores(small(moved(real_film(), share, 45)))["sharpness"] for share in (0.0, 0.01, 0.02, 0.03, 0.05)
    ]
    assert scores == sorted(scores, reverse=True) and scores[0] > 5 * scores[-1]


@pytest.mark.parametrize("gain", [3, 5])
def test_over_exposure_is_dropped(gain):
    for image in [real_film(), *(image for image in phantoms() if quality_scores(image)["black"] < 0.2)]:
        assert Quality().reason(small(float(gain) * image)) == "over-exposed"
        assert Quality().reason(small(image / 255.0 - gain * 2)) == "over-exposed"  # burnt out to black


@pytest.mark.parametrize("deviation", [0, 1, 5, 20, 60])
@pytest.mark.parametrize("level", [60, 128, 200])
def test_blank_films_are_dropped(level, deviation):
    noise = np.random.default_rng(0).normal(level, deviation, (256, 300))
    assert Quality().reason(small(noise)) == "blank image"


@pytest.mark.parametrize("make", [np.zeros, np.ones, lambda shape, dtype: np.full(shape, 255, dtype)])
def test_constant_films_have_finite_scores(make):
    scores = quality_scores(make((300, 256), np.uint8))
    assert all(np.isfinite(value) for value in scores.values()) and Quality().reason(make((300, 256), np.uint8))


def test_scores_hardly_depend_on_the_resolution():
    fine, coarse = quality_scores(real_film(short_side=1024)), quality_scores(real_film(short_side=256))
    assert fine.keys() == coarse.keys() == asdict(Quality()).keys()
    assert fine["sharpness"] == pytest.approx(coarse["sharpness"], rel=0.1)
    assert fine["contrast"] == pytest.approx(coarse["contrast"], rel=0.02)


def test_limits_can_be_set():
    blurred = small(moved(real_film(), 0.08, 0))
    assert Quality(sharpness=0).reason(blurred) == ""
    assert Quality(1, 1, 0, -np.inf).reason(np.zeros((256, 256), np.uint8)) == ""
    assert Quality(sharpness=1).reason(small(real_film())) == "motion-blurred"
