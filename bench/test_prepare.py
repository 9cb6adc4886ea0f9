"""Reading radiographs with this package against a plain loop of pydicom and Pillow, on one core and the same files.

Both make the same film: windowed to 8 bits by the file's window, or its 0.5 to 99.5 percentiles where it has none,
reduced to a short side of 256 and encoded as JPEG; ours judges its quality too. They run in turns in one process.
"""

import io

import numpy as np
import pytest
from PIL import Image

from clinvla_fast.data.phantom import phantom_studies
from clinvla_fast.data.quality import Quality
from clinvla_fast.data.radiographs import Reading, read_radiograph

pydicom = pytest.importorskip("pydicom", reason="needs pydicom")
pytest.importorskip("data_store", reason="needs pydicom-data")

SIDE = 256
KINDS = {"uncompressed": 15, "no window": 15, "jpeg 2000": 5, "png": 11, "png 16": 7, "jpeg": 15}
"""And rounds: fewer where a turn takes long."""


def film(name):
    return pydicom.data.get_testdata_file(name, download=False)


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """The paths of each kind: a real film and phantoms at a real film's size."""
    folder = tmp_path_factory.mktemp("films")
    real = read_radiograph(film("RG1_UNCR.dcm"), 1841)
    phantoms = [image for study in phantom_studies(3, size=512) for image in study.images.values()]
    grays = [real, *(np.asarray(Image.fromarray(image).resize((2000, 2000))) for image in phantoms[:3])]
    for number, gray in enumerate(grays):
        Image.fromarray(gray).save(folder / f"{number}.png")
        Image.fromarray(gray.astype(np.uint16) * 128 + 50).save(folder / f"{number}-16.png")
        Image.fromarray(gray).save(folder / f"{number}.jpg", quality=95)
    dataset = pydicom.dcmread(film("RG1_UNCR.dcm"))
    del dataset.WindowWidth, dataset.WindowCenter
    dataset.save_as(folder / "no-window.dcm")
    return {
        "uncompressed": [film("RG1_UNCR.dcm"), film("RG1_UNCI.dcm")],
        "no window": [folder / "no-window.dcm"],
        "jpeg 2000": [film("RG1_J2KR.dcm"), film("RG1_J2KI.dcm")],
        "png": sorted(folder.glob("?.png")),
        "png 16": sorted(folder.glob("?-16.png")),
        "jpeg": sorted(folder.glob("*.jpg")),
    }


def plain(path):
    if not str(path).endswith(".dcm"):
        values = np.asarray(Image.open(path))
        if values.dtype == np.uint8:
            return encoded(values)
        return encoded(stretched(values, *np.percentile(values, (0.5, 99.5))))
    dataset = pydicom.dcmread(path)
    values = pydicom.pixels.apply_modality_lut(dataset.pixel_array, dataset)
    if "WindowWidth" in dataset:
        values = pydicom.pixels.apply_voi_lut(values, dataset)
        image = stretched(values, 0, 2**dataset.BitsStored - 1)
    else:
        image = stretched(values, *np.percentile(values, (0.5, 99.5)))
    return encoded(255 - image if dataset.PhotometricInterpretation == "MONOCHROME1" else image)


def stretched(values, low, high):
    return ((values.astype(np.float32) - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8)


def encoded(pixels):
    image = Image.fromarray(pixels)
    scale = SIDE / min(image.size)
    image = image.resize([round(scale * length) for length in image.size], Image.Resampling.BILINEAR)
    image.save(buffer := io.BytesIO(), format="JPEG", quality=95)
    return buffer.getvalue()


def ours(path):
    return encoded(read_radiograph(path, SIDE, Reading(quality=Quality())))


@pytest.mark.parametrize("kind", KINDS)
def test_reading(measured, films, kind):
    paths = films[kind]
    for path in paths:
        same = [np.asarray(Image.open(io.BytesIO(way(path)))).astype(int) for way in (plain, ours)]
        assert abs(same[0] - same[1]).mean() < 1
    runs = {way.__name__: lambda way=way: [way(path) for path in paths] for way in (plain, ours)}
    taken = measured.turns(runs, KINDS[kind])
    measured.faster("than pydicom and Pillow", taken["plain"], taken["ours"], least=1)
