import importlib.util
import io
import json
import logging
import os
import pickle
import random
import struct
import sys
import zlib
from dataclasses import asdict

import imagecodecs
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from clinvla_fast.data.quality import Quality
from clinvla_fast.data.radiographs import REASONS, Reading, UnreadableImage, crop_borders, fill_text, read_radiograph
from clinvla_fast.errors import DataError

pydicom = pytest.importorskip("pydicom", reason="needs pydicom")


def film(name):
    if not importlib.util.find_spec("data_store"):
        pytest.skip("needs pydicom-data")
    return pydicom.data.get_testdata_file(name, download=False)


def gradient(height=300, width=400):
    return np.add.outer(np.arange(height), np.arange(width)).astype(np.uint16)


def write_dicom(path, pixels, *, no_preamble=False, **tags):
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", "1.2.3"
    dataset.PatientName = "Secret^Name"
    dataset.Modality, dataset.BodyPartExamined = "DX", "CHEST"
    dataset.PhotometricInterpretation, dataset.SamplesPerPixel = "MONOCHROME2", 1
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.PixelData = pixels.astype(np.uint16).tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    if no_preamble:
        del dataset.file_meta
        pydicom.dcmwrite(path, dataset, implicit_vr=True, little_endian=True)
        assert ImplicitVRLittleEndian.is_implicit_VR
    else:
        pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    return path


def write_coded(path, frame, syntax, pixels, **tags):
    """A DICOM file of one coded frame."""
    from pydicom.encaps import encapsulate

    write_dicom(path, pixels, **tags)
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
    dataset.PixelData = encapsulate([frame])
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(path)
    return path


def code(pixels, syntax):
    if syntax == "JPEGLSLossless":
        return imagecodecs.jpegls_encode(pixels)
    return imagecodecs.jpeg8_encode(pixels, bitspersample=12, **({"lossless": True} if "Lossless" in syntax else {}))


def test_every_png_is_as_pillow_reads_it(tmp_path):
    gray = np.random.default_rng(0).integers(0, 256, (120, 151), np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    for case, options in enumerate(({}, {"exif": turned}, {"transparency": 3}, {"compress_level": 0})):
        path = tmp_path / f"{case}.png"
        Image.fromarray(gray).save(path, **options)
        expected = np.rot90(gray, -1) if "exif" in options else gray
        for more in (b"", b"IEND and more"):
            path.write_bytes(path.read_bytes() + more)
            np.testing.assert_array_equal(read_radiograph(path, 120), expected)
    path.write_bytes(path.read_bytes()[:9000])
    refused(path, "truncated image")


def refused(path, reason, **options):
    with pytest.raises(UnreadableImage) as caught:
        read_radiograph(path, **options)
    assert caught.value.reason == reason and reason in REASONS
    assert str(caught.value).startswith(f"{path}: {reason}; expected ")
    assert "secret" not in str(caught.value).lower()
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_real_film_is_shown_with_air_dark():
    image = read_radiograph(film("RG1_UNCR.dcm"), 600)
    assert image.shape == (637, 600) and image.dtype == np.uint8
    air, lung, mediastinum = image[15:40, 5:60].mean(), image[60:180, 160:240].mean(), image[200:300, 285:315].mean()
    assert air + 20 < lung < mediastinum - 50


def test_real_film_compressed_and_not_is_the_same():
    np.testing.assert_array_equal(read_radiograph(film("RG1_UNCR.dcm")), read_radiograph(film("RG1_J2KR.dcm")))
    lossy = read_radiograph(film("RG1_J2KI.dcm")).astype(int)
    assert abs(lossy - read_radiograph(film("RG1_UNCI.dcm"))).max() <= 2


@pytest.mark.parametrize("syntax", ["RLELossless", "JPEG2000Lossless", "JPEGLSLossless", "JPEGLosslessSV1"])
def test_lossless_codings_are_the_same(tmp_path, syntax):
    whole = film("RG1_UNCR.dcm")
    dataset = pydicom.dcmread(whole)
    if syntax in ("RLELossless", "JPEG2000Lossless"):
        dataset.compress(getattr(pydicom.uid, syntax))
    else:
        from pydicom.encaps import encapsulate

        pixels = dataset.pixel_array
        if syntax == "JPEGLSLossless":
            frame = imagecodecs.jpegls_encode(pixels)
        else:
            frame = imagecodecs.jpeg8_encode(pixels, bitspersample=15, lossless=True)
        dataset.PixelData = encapsulate([frame])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
    dataset.save_as(tmp_path / "film.dcm")
    np.testing.assert_array_equal(read_radiograph(tmp_path / "film.dcm"), read_radiograph(whole))


@pytest.mark.parametrize("syntax", ["JPEGLSLossless", "JPEGLossless", "JPEGLosslessSV1"])
def test_coded_pixels_with_a_sign(tmp_path, syntax):
    signed = gradient().astype(np.int16) - 350
    tags = {"PixelRepresentation": 1}
    plain = write_dicom(tmp_path / "plain.dcm", signed.astype(np.uint16) & 0xFFF, **tags)
    coded = code(signed.astype(np.uint16) & 0xFFF, syntax)
    coded = write_coded(tmp_path / "coded.dcm", coded, syntax, gradient(), **tags)
    np.testing.assert_array_equal(read_radiograph(coded), read_radiograph(plain))


def test_12_bit_jpeg(tmp_path):
    coded = write_coded(
        tmp_path / "coded.dcm", code(gradient() * 5, "JPEGExtended12Bit"), "JPEGExtended12Bit", gradient()
    )
    plain = write_dicom(tmp_path / "plain.dcm", gradient() * 5)
    assert abs(read_radiograph(coded).astype(int) - read_radiograph(plain)).max() <= 2


def test_big_endian_and_deflated_are_the_same(tmp_path):
    plain = write_dicom(tmp_path / "plain.dcm", gradient())
    dataset = pydicom.dcmread(plain)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    dataset.save_as(tmp_path / "deflated.dcm")
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRBigEndian
    dataset.PixelData = gradient().astype(">u2").tobytes()
    pydicom.dcmwrite(tmp_path / "big.dcm", dataset, implicit_vr=False, little_endian=False)
    for name in ("deflated.dcm", "big.dcm"):
        np.testing.assert_array_equal(read_radiograph(tmp_path / name), read_radiograph(plain))


def test_ankle_is_refused():
    refused(film("RG3_UNCR.dcm"), "not a chest radiograph")


def test_dicom_is_known_by_its_content_or_suffix(tmp_path):
    expected = read_radiograph(write_dicom(tmp_path / "film.dcm", gradient()))
    np.testing.assert_array_equal(read_radiograph(write_dicom(tmp_path / "film", gradient())), expected)
    bare = write_dicom(tmp_path / "bare.dcm", gradient(), no_preamble=True)
    np.testing.assert_array_equal(read_radiograph(bare), expected)


def test_dicom_without_window_uses_percentiles(tmp_path):
    pixels = gradient()
    pixels[0, 0] = 4095  # one hot pixel must not darken the rest
    image = read_radiograph(write_dicom(tmp_path / "a.dcm", pixels), 300)
    assert image.shape == (300, 400)
    assert image[150, 0] < image[150, 200] < image[150, 399] and image[299, 399] == 255 and image[0, 1] == 0


def test_monochrome1_is_inverted(tmp_path):
    upright = read_radiograph(write_dicom(tmp_path / "a.dcm", gradient()))
    inverted = read_radiograph(write_dicom(tmp_path / "b.dcm", gradient(), PhotometricInterpretation="MONOCHROME1"))
    assert abs(255 - upright.astype(int) - inverted).max() <= 1  # resized before or after inverting


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_window(tmp_path, function):
    path = write_dicom(tmp_path / "a.dcm", gradient(), WindowCenter=200, WindowWidth=100, VOILUTFunction=function)
    row = read_radiograph(path, 300)[0].astype(int)
    assert abs(row[200] - 127.5) <= 2 and row[0] <= 1 and row[399] >= 254
    assert (np.diff(row) >= 0).all() and row[225] == pytest.approx(191 if function != "SIGMOID" else 186, abs=2)


def test_first_of_several_windows_after_rescaling(tmp_path):
    tags = {"RescaleSlope": 2, "RescaleIntercept": -100, "WindowCenter": [300, 9], "WindowWidth": [200, 9]}
    row = read_radiograph(write_dicom(tmp_path / "a.dcm", gradient(), **tags), 300)[0].astype(int)
    assert row[100] == 0 and abs(row[200] - 127) <= 2 and row[300] == 255


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_fixed_window_takes_the_place_of_the_files_own(tmp_path, photometric):
    tags = {"RescaleSlope": 4, "RescaleIntercept": -1500, "WindowCenter": 40, "WindowWidth": 80}
    path = write_dicom(tmp_path / "a.dcm", gradient(), PhotometricInterpretation=photometric, **tags)
    row = read_radiograph(path, 300, Reading(window=(1500, -500)))[0].astype(int)
    hu = 4 * np.arange(400) - 1500
    expected = np.rint(255 * np.clip((hu + 1250) / 1500, 0, 1))
    assert abs(row - (expected if photometric == "MONOCHROME2" else 255 - expected)).max() <= 1


def test_the_papers_window_leaves_nothing_of_a_plain_radiograph():
    refused(film("RG1_UNCR.dcm"), "blank image", options=Reading(window=(1500, -500)))


@pytest.mark.parametrize("window", [(0, 1), (-5, 1), (float("nan"), 1), (10, float("inf"))])
def test_no_such_window(window):
    with pytest.raises(DataError, match="expected a width above 0"):
        Reading(window=window)


def test_reading_becomes_json():
    reading = Reading(window=(1500, -500), quality=Quality())
    assert json.loads(json.dumps(asdict(reading)))["window"] == [1500, -500]
    assert asdict(reading)["quality"]["white"] == Quality().white


def test_voi_lut_comes_before_the_window(tmp_path):
    item = pydicom.Dataset()
    item.LUTDescriptor = [700, 0, 8]  # 8-bit entries at indices above 255
    item.add_new("LUTData", "US", [0] * 300 + [255] * 400)
    tags = {"VOILUTSequence": [item], "WindowCenter": 100, "WindowWidth": 10}
    row = read_radiograph(write_dicom(tmp_path / "a.dcm", gradient(), **tags), 300)[0]
    assert (row[:299] == 0).all() and (row[301:] == 255).all()


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"Modality": "CT"}, "not a chest radiograph"),
        ({"Modality": "SECRET"}, "not a chest radiograph"),
        ({"BodyPartExamined": "ANKLE"}, "not a chest radiograph"),
        ({"NumberOfFrames": 2, "PixelData": bytes(2 * 2 * 300 * 400)}, "multi-frame DICOM"),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3, "PlanarConfiguration": 0}, "colour DICOM"),
        ({"Rows": 1000, "Columns": 120}, "extreme aspect ratio"),
        ({"PixelData": bytes(1000)}, "truncated image"),
        ({"PixelData": bytes(2 * 300 * 400)}, "blank image"),
    ],
)
def test_refused_dicom(tmp_path, tags, reason):
    refused(write_dicom(tmp_path / "a.dcm", gradient(), **tags), reason)


@pytest.mark.parametrize("tags", [{"Modality": "CR", "BodyPartExamined": ""}, {"BodyPartExamined": "PORT CHEST"}])
def test_accepted_dicom(tmp_path, tags):
    assert read_radiograph(write_dicom(tmp_path / "a.dcm", gradient(), **tags)).shape == (256, 341)


def test_dicom_without_decoder_or_pixels(tmp_path, monkeypatch):
    for uid in (b"1.2.840.10008.1.2.99", b"1.2.840.10008.1.2.4."):
        unknown = write_dicom(tmp_path / "a.dcm", gradient())
        unknown.write_bytes(unknown.read_bytes().replace(b"1.2.840.10008.1.2.1\0", uid))
        refused(unknown, "no decoder for this DICOM")
    refused(write_coded(tmp_path / "film.dcm", b"\0" * 100, "MPEG2MPML", gradient()), "truncated image")
    (tmp_path / "text.dcm").write_text("not a film")
    refused(tmp_path / "text.dcm", "not an image")
    whole = write_dicom(tmp_path / "b.dcm", gradient())
    whole.write_bytes(whole.read_bytes()[:5000])
    refused(whole, "truncated image")


def test_missing_pydicom_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    (tmp_path / "a.dcm").write_bytes(bytes(128) + b"DICM")
    with pytest.raises(DataError, match=r'pip install "clinvla-fast\[dicom\]"') as caught:
        read_radiograph(tmp_path / "a.dcm")
    assert not isinstance(caught.value, UnreadableImage)  # it must stop the run, not drop every study


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA"])
def test_png_modes_keep_their_gray_values(tmp_path, mode):
    pixels = (gradient(256, 256) // 2).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_radiograph(tmp_path / "a.png"), pixels)


def test_jpeg(tmp_path):
    pixels = (gradient(2000, 1500) // 14).astype(np.uint8)
    Image.fromarray(pixels).convert("RGB").save(tmp_path / "a.jpg", quality=95)
    image = read_radiograph(tmp_path / "a.jpg")
    assert image.shape == (341, 256)
    assert (
        abs(image[::10, ::10].astype(int) - np.asarray(Image.fromarray(pixels).resize((256, 341)))[::10, ::10]).max()
        < 6
    )


def test_16_bit_png_is_monotone(tmp_path):
    pixels = (gradient(256, 256) * 120).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = read_radiograph(tmp_path / "a.png")
    assert image.min() == 0 and image.max() == 255
    assert (np.diff(image.ravel()[np.argsort(pixels.ravel(), kind="stable")].astype(int)) >= 0).all()


@pytest.mark.parametrize("levels", [3, 50, 60_000])
@pytest.mark.parametrize("height", [64, 97, 200])
def test_16_bit_values_are_windowed_to_exactly_their_percentiles(tmp_path, height, levels):
    pixels = np.random.default_rng(height).integers(0, levels, (height, 64), np.uint16)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    low, high = np.percentile(pixels, (0.5, 99.5))
    share = (pixels.astype(np.float32) - np.float32(low)) / np.float32(high - low)
    expected = np.rint(255 * share.clip(0, 1)).astype(np.uint8)
    np.testing.assert_array_equal(read_radiograph(tmp_path / "a.png", 64), expected)


def test_small_images_grow_to_the_short_side(tmp_path):
    Image.fromarray(gradient(50, 70).astype(np.uint8)).save(tmp_path / "a.png")
    assert read_radiograph(tmp_path / "a.png", 100).shape == (100, 140)


def test_downscaling_is_antialiased(tmp_path):
    checks = (np.indices((1024, 1024)).sum(0) % 2 * 255).astype(np.uint8)
    checks[:, :512] = 0
    Image.fromarray(checks).save(tmp_path / "a.png")
    assert abs(read_radiograph(tmp_path / "a.png")[8:-8, 140:-8].astype(int) - 128).max() <= 3


def test_refused_files(tmp_path):
    refused(tmp_path / "none.png", "file is missing")
    refused(tmp_path, "file cannot be read")
    (tmp_path / "text.png").write_text("hello")
    refused(tmp_path / "text.png", "not an image")
    (tmp_path / "empty.jpg").touch()
    refused(tmp_path / "empty.jpg", "not an image")
    Image.fromarray(gradient(600, 600).astype(np.uint8)).save(tmp_path / "a.gif")
    refused(tmp_path / "a.gif", "not an image")
    noise = np.random.default_rng(0).integers(0, 256, (600, 600), np.uint8)
    for name in ("half.png", "half.jpg"):
        Image.fromarray(noise).save(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        refused(tmp_path / name, "truncated image")
    Image.new("L", (300, 300), 7).save(tmp_path / "blank.png")
    refused(tmp_path / "blank.png", "blank image")
    Image.fromarray(noise[:100]).save(tmp_path / "strip.png")
    refused(tmp_path / "strip.png", "extreme aspect ratio")
    Image.new("L", (14000, 14000)).save(tmp_path / "huge.png")
    refused(tmp_path / "huge.png", "image too large")


def test_film_without_borders_stays_as_it_is():
    for name in ("RG1_UNCR.dcm", "RG1_J2KI.dcm"):
        whole = read_radiograph(film(name))
        np.testing.assert_array_equal(read_radiograph(film(name), options=Reading(crop_borders=True)), whole)
    y, x = np.indices((400, 400)) - 200
    body = np.where(x**2 + (y / 1.5) ** 2 < 150**2, 160, 0).astype(np.uint8)  # air all around, but no straight edge
    assert crop_borders(body) is body or np.array_equal(crop_borders(body), body)


@pytest.mark.parametrize("level", [0, 12, 255])
@pytest.mark.parametrize("borders", [(0.1, 0.2, 0.05, 0.15), (0, 0.08, 0, 0), (0.2, 0, 0.2, 0.2)])
def test_borders_are_cropped(level, borders):
    whole = read_radiograph(film("RG1_UNCR.dcm"), 800)
    height, width = whole.shape
    top, bottom, left, right = (
        int(share * side) for share, side in zip(borders, (height,) * 2 + (width,) * 2, strict=True)
    )
    rng = np.random.default_rng(0)
    film_and_borders = (level + rng.normal(0, 3, whole.shape)).clip(0, 255).astype(np.uint8)
    film_and_borders[top : height - bottom, left : width - right] = whole[top : height - bottom, left : width - right]
    ImageDraw.Draw(shown := Image.fromarray(film_and_borders)).rectangle((30, 2, 60, 20), fill=128)  # a marker
    cropped = crop_borders(np.asarray(shown))
    slack = 2 * 800 // 128
    assert 0 <= height - top - bottom - cropped.shape[0] <= slack
    assert 0 <= width - left - right - cropped.shape[1] <= slack
    shown = np.asarray(shown)
    places = [(y, x) for y in range(top, top + slack) for x in range(left, left + slack)]
    windows = (shown[y : y + cropped.shape[0], x : x + cropped.shape[1]] for y, x in places)
    assert any(np.array_equal(window, cropped) for window in windows)  # cut, never resampled


def test_no_more_than_the_share_is_cropped():
    image = np.zeros((400, 400), np.uint8)
    image[180:220, 150:250] = gradient(40, 100)[:, :] + 100
    cropped = crop_borders(image)
    assert cropped.shape[0] >= 0.4 * 400 - 1 and cropped.shape[1] >= 0.4 * 400 - 1


@pytest.fixture
def with_text():
    """A real film, the same with a name and parameters burnt in, and where."""
    pytest.importorskip("rapidocr_onnxruntime", reason="needs rapidocr-onnxruntime (Python 3.11 or 3.12)")
    import matplotlib

    whole = read_radiograph(film("RG1_UNCR.dcm"), 1200)
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 26)
    ImageDraw.Draw(image := Image.fromarray(whole)).text((20, 20), "SECRET^NAME 1961-02-03", fill=255, font=font)
    ImageDraw.Draw(image).text((820, 1225), "ID 4711-0815 kV=120", fill=0, font=font)
    return whole, np.asarray(image)


def test_burnt_in_text_is_filled(with_text, caplog, capfd):
    from rapidocr_onnxruntime import RapidOCR

    whole, burnt = with_text
    with caplog.at_level(logging.DEBUG):
        filled = fill_text(burnt)
    printed = capfd.readouterr()
    assert "secret" not in (caplog.text + printed.out + printed.err).lower()
    assert len(RapidOCR()(burnt)[0]) >= 2 and RapidOCR()(filled)[0] is None
    changed = filled != burnt
    assert (burnt != whole)[~changed].sum() < 20  # all but specks of the letters
    corners = np.zeros(changed.shape, bool)
    corners[:100, :500] = corners[-100:, 750:] = True
    assert not changed[~corners].any() and changed.mean() < 0.05
    assert abs(filled[corners].astype(int) - whole[corners]).mean() < 12  # like what was there


def test_film_without_text_stays_as_it_is(with_text):
    whole, _ = with_text
    assert fill_text(whole) is whole


def test_text_is_filled_where_it_is_asked_for(with_text, tmp_path):
    Image.fromarray(with_text[1]).save(tmp_path / "a.png")
    plain = read_radiograph(tmp_path / "a.png", 600)
    filled = read_radiograph(tmp_path / "a.png", 600, Reading(fill_text=True))
    assert (plain[:50, :250] != filled[:50, :250]).mean() > 0.1
    np.testing.assert_array_equal(plain[100:-100], filled[100:-100])


def test_missing_ocr_says_what_to_install(monkeypatch):
    from clinvla_fast.data import radiographs

    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    radiographs._ocr.cache_clear()
    with pytest.raises(DataError, match=r'pip install "clinvla-fast\[ocr\]"'):
        fill_text(np.zeros((300, 300), np.uint8))
    radiographs._ocr.cache_clear()


def test_poor_films_are_refused(tmp_path):
    white = np.full((300, 400), 255, np.uint8)
    white[:60] = gradient(60, 400) // 2
    Image.fromarray(white).save(tmp_path / "a.png")
    assert read_radiograph(tmp_path / "a.png").shape == (256, 341)
    for short_side in (64, 256, 400):
        refused(tmp_path / "a.png", "over-exposed", short_side=short_side, options=Reading(quality=Quality()))


@pytest.mark.parametrize("short_side", [48, 256, 1024])
def test_a_sound_film_is_kept_at_any_size(tmp_path, short_side):
    options = Reading(quality=Quality(), crop_borders=True)
    Image.fromarray(read_radiograph(film("RG1_J2KI.dcm"), 1841)).save(tmp_path / "a.jpg", quality=95)
    expected = read_radiograph(film("RG1_J2KI.dcm"), short_side)
    np.testing.assert_array_equal(read_radiograph(film("RG1_J2KI.dcm"), short_side, options), expected)
    # JPEG is scaled while it is decoded, less so where more is asked of it.
    assert abs(read_radiograph(tmp_path / "a.jpg", short_side, options) - expected.astype(int)).mean() < 2


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX files")
def test_paths_that_are_no_files_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.dcm")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    for path in (tmp_path / "pipe.dcm", tmp_path / "loop.png", "/dev/zero", "a\0b.png", "a" * 5000):
        refused(path, "file cannot be read")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    refused(tmp_path / "gone.png", "file is missing")


def png(width, height, *chunks, bits=8):
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0))
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in (header, *chunks, (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")):
        parts.append(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
    return b"".join(parts)


def test_absurd_pictures(tmp_path):
    bomb = zlib.compress(bytes(200 * 2**20))
    files = {
        "pixel.png": (png(1, 1), "blank image"),
        "strip.png": (png(60_000, 2), "extreme aspect ratio"),
        "huge.png": (png(65_535, 65_535, bits=16), "image too large"),
        "zTXt.png": (png(300, 300, (b"zTXt", b"k\0\0" + bomb)), "truncated image"),
        "iCCP.png": (png(300, 300, (b"iCCP", b"k\0\0" + bomb)), "truncated image"),
        "nothing.png": (b"", "not an image"),
        "nothing.dcm": (b"", "not an image"),
    }
    Image.fromarray(gradient(300, 300).astype(np.uint8)).save(buffer := io.BytesIO(), "JPEG", progressive=True)
    jpeg = buffer.getvalue()
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    files["scans.jpg"] = jpeg[:-2] + 300 * scan + jpeg[-2:], "image too large"
    for name, (content, reason) in files.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, reason)


def test_absurd_dicom_is_refused_before_memory_is_taken(tmp_path):
    import tracemalloc

    huge = write_dicom(tmp_path / "huge.dcm", gradient(), Rows=65_535, Columns=65_535)
    coded = pydicom.dcmread(write_dicom(tmp_path / "coded.dcm", gradient()))
    coded.compress(pydicom.uid.JPEG2000Lossless)
    coded.save_as(tmp_path / "coded.dcm")
    content = (tmp_path / "coded.dcm").read_bytes()
    start = content.index(b"\xff\x4f\xff\x51") + 8
    (tmp_path / "coded.dcm").write_bytes(content[:start] + struct.pack(">2I", 60_000, 60_000) + content[start + 8 :])
    bomb = pydicom.dcmread(write_dicom(tmp_path / "bomb.dcm", gradient()))
    bomb.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    bomb.add_new(0x00091001, "OB", bytes(513 * 2**20))
    bomb.save_as(tmp_path / "bomb.dcm")
    del bomb
    tracemalloc.start()
    refused(huge, "image too large")
    refused(tmp_path / "coded.dcm", "truncated image")
    refused(tmp_path / "bomb.dcm", "image too large")
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory):
    """Small files of every kind that is read, made of a real film."""
    folder = tmp_path_factory.mktemp("whole")
    pixels = np.ascontiguousarray(pydicom.dcmread(film("RG1_UNCR.dcm")).pixel_array[600:760, 500:700] >> 3)
    gray = Image.fromarray((pixels >> 4).astype(np.uint8))
    for mode in ("L", "P", "RGBA"):
        gray.convert(mode).save(folder / f"{mode}.png")
    Image.fromarray(pixels).save(folder / "16.png")
    gray.save(folder / "plain.jpg")
    gray.save(folder / "progressive.jpg", progressive=True)
    gray.convert("CMYK").save(folder / "cmyk.jpg")
    plain = write_dicom(folder / "plain.dcm", pixels, WindowCenter=2000, WindowWidth=3000)
    write_dicom(folder / "bare.dcm", pixels, no_preamble=True)
    dataset = pydicom.dcmread(plain)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    dataset.save_as(folder / "deflated.dcm")
    for syntax in ("RLELossless", "JPEG2000Lossless"):
        dataset = pydicom.dcmread(plain)
        dataset.compress(getattr(pydicom.uid, syntax))
        dataset.save_as(folder / f"{syntax}.dcm")
    for syntax in ("JPEGLSLossless", "JPEGLosslessSV1", "JPEGExtended12Bit"):
        write_coded(folder / f"{syntax}.dcm", code(pixels, syntax), syntax, pixels)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def damaged(content, rng):
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(content) if rng.random() < 0.4 else min(len(content), 2000)) if content else 0
        kind = rng.randrange(6)
        if kind == 0:
            content[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            content[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", bytes(4), b"\x60\xea\x60\xea"))
        elif kind == 2:
            del content[at : at + rng.randrange(1, 64)]
        elif kind == 3:
            content[at:at] = content[max(0, at - 40) : at]
        elif kind == 4:
            content[at : at + 8] = rng.randbytes(8)
        else:
            del content[max(1, at) :]
    return bytes(content)


def test_damaged_files_are_read_or_refused(whole_files, tmp_path):
    rng, reasons = random.Random(0), set()
    for name, content in whole_files.items():
        (tmp_path / name).write_bytes(content)
        assert read_radiograph(tmp_path / name, 64).shape == (64, 80)
        for _ in range(25):
            (tmp_path / name).write_bytes(damaged(content, rng))
            try:
                image = read_radiograph(tmp_path / name, 64, Reading(crop_borders=True, quality=Quality()))
                assert image.dtype == np.uint8 and min(image.shape) == 64
            except UnreadableImage as error:
                assert "secret" not in str(error).lower()
                reasons.add(error.reason)
    assert {"not an image", "truncated image"} <= reasons <= REASONS


@pytest.mark.parametrize("width", [0, 0.5, [0, 2000], None])
def test_a_window_that_is_none_is_not_used(tmp_path, width):
    plain = read_radiograph(write_dicom(tmp_path / "a.dcm", gradient()), 64)
    found = read_radiograph(write_dicom(tmp_path / "b.dcm", gradient(), WindowCenter=200, WindowWidth=width), 64)
    assert np.array_equal(found, plain)


def test_an_8_bit_lut_packed_two_entries_to_a_word(tmp_path):
    table = (np.arange(4096) // 16).astype(np.uint8)
    films = []
    for name, data, bits in (("a", table.tobytes(), 8), ("b", table.astype("<u2").tobytes(), 16)):
        item = pydicom.Dataset()
        item.LUTDescriptor, item.LUTData = [4096, 0, bits], data
        item["LUTData"].VR = "OW"
        films.append(read_radiograph(write_dicom(tmp_path / f"{name}.dcm", 5 * gradient(), VOILUTSequence=[item]), 64))
    assert np.array_equal(*films)
