import importlib.util
import pickle

import numpy as np
import pytest
from PIL import Image

from clinvla_fast.data.radiographs import UnreadableImage, read_radiograph
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


def refused(path, reason):
    with pytest.raises(UnreadableImage) as caught:
        read_radiograph(path)
    assert caught.value.reason == reason
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


def test_dicom_without_decoder_or_pixels(tmp_path):
    jpeg_ls = write_dicom(tmp_path / "a.dcm", gradient())
    jpeg_ls.write_bytes(jpeg_ls.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.99"))
    with pytest.raises(UnreadableImage, match=r"a\.dcm: "):
        read_radiograph(jpeg_ls)
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
