"""Chest radiographs from PNG, JPEG and DICOM files, as 8-bit gray with air dark."""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import DataError

# RG is computed radiography's older name. A blank tag says nothing against the image.
_MODALITIES = ("CR", "DX", "RG", "")
_BODY_PARTS = ("CHEST", "THORAX", "TORAX", "TORACE", "LUNG")
_PERCENTILES = (0.5, 99.5)
_MAX_ASPECT = 4

# Only these are parsed, so nothing that names the patient can reach a message.
_TAGS = [
    *("Modality", "BodyPartExamined", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"),
    *("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData"),
    *("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept"),
    *("VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction"),
]


class UnreadableImage(DataError):
    """An image that cannot be used.

    The message names the file, the reason and what was expected; `reason` is the bare category, for counting.
    """

    def __init__(self, path: str | Path, reason: str, expected: str):
        super().__init__(path, reason, expected)
        self.reason = reason

    def __str__(self) -> str:
        path, reason, expected = self.args
        return f"{path}: {reason}; expected {expected}."


def read_radiograph(path: str | Path, short_side: int = 256) -> np.ndarray:
    """The radiograph at `path`, its short side resized to exactly `short_side`.

    8-bit PNG and JPEG keep their values. 16-bit PNG is windowed to its 0.5 to 99.5 percentiles. DICOM goes through
    its modality LUT, then its VOI LUT or window (the percentiles if it has neither), and MONOCHROME1 is inverted.

    Returns:
        uint8 [H, W], min(H, W) == short_side.

    Raises:
        UnreadableImage: if the file is missing, damaged, blank, or is no single gray chest radiograph.
        DataError: if the file is DICOM and pydicom is not installed.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise UnreadableImage(path, "file is missing", "a PNG, JPEG or DICOM file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise UnreadableImage(path, "file cannot be read", f"a readable file ({type(error).__name__})") from None
    if content[128:132] == b"DICM" or Path(path).suffix.lower() in (".dcm", ".dicom"):
        image = _read_dicom(path, content)
    else:
        image = _read_picture(path, content, short_side)
    low, high = np.percentile(image, _PERCENTILES)
    if low == high:
        raise UnreadableImage(path, "blank image", "more than one gray level")
    return _resize(image, short_side)


def _read_picture(path: str | Path, content: bytes, short_side: int) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
            _check_size(path, *image.size)
            image.draft("L", (2 * short_side, 2 * short_side))  # JPEG decodes several times faster when scaled inside
            image.load()
            image = ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise UnreadableImage(path, "not an image", "PNG, JPEG or DICOM") from None
    except Image.DecompressionBombError:
        raise _too_large(path) from None
    except (OSError, SyntaxError, ValueError):  # what Pillow raises on damaged files
        raise UnreadableImage(path, "truncated image", "a whole PNG or JPEG file") from None
    if image.mode.startswith("I"):
        return _percentile_window(np.asarray(image))
    return np.asarray(image.convert("L"))


def _read_dicom(path: str | Path, content: bytes) -> np.ndarray:
    try:
        import pydicom
        from pydicom.pixels import get_decoder
    except ImportError:
        raise DataError(f'{path} is a DICOM file: pip install "clinvla-fast[dicom]" to read it.') from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's warnings print tag values
        try:
            dataset = pydicom.dcmread(io.BytesIO(content), force=True, specific_tags=_TAGS)
            _check_dicom(path, dataset)
            # A file without its header is in DICOM's default transfer syntax.
            dataset.file_meta.setdefault("TransferSyntaxUID", pydicom.uid.ImplicitVRLittleEndian)
            syntax = dataset.file_meta.TransferSyntaxUID
            if not get_decoder(syntax).is_available:
                expected = f"a transfer syntax with an installed decoder, not {syntax.name} (pip install python-gdcm)"
                raise UnreadableImage(path, "no decoder for this DICOM", expected)
            values = pydicom.pixels.apply_modality_lut(dataset.pixel_array, dataset)
            image = _voi(values, dataset)
        except DataError:
            raise
        except Exception:  # damaged bytes raise anything in pydicom and its decoders, with tag values in the text
            raise UnreadableImage(path, "truncated image", "a whole DICOM file with decodable pixels") from None
    return 255 - image if dataset.PhotometricInterpretation == "MONOCHROME1" else image


def _check_dicom(path: str | Path, dataset) -> None:
    if "PixelData" not in dataset:
        raise UnreadableImage(path, "not an image", "a DICOM file with pixel data")
    if str(dataset.get("Modality") or "").strip().upper() not in _MODALITIES:
        raise UnreadableImage(path, "not a chest radiograph", "Modality CR, DX or RG")
    part = str(dataset.get("BodyPartExamined") or "").strip().upper()
    if part and not any(name in part for name in _BODY_PARTS):
        raise UnreadableImage(path, "not a chest radiograph", "BodyPartExamined CHEST or THORAX")
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        raise UnreadableImage(path, "multi-frame DICOM", "a single image")
    if dataset.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise UnreadableImage(path, "colour DICOM", "MONOCHROME1 or MONOCHROME2")
    _check_size(path, dataset.Columns, dataset.Rows)


def _check_size(path: str | Path, width: int, height: int) -> None:
    if max(width, height) > _MAX_ASPECT * min(width, height):
        raise UnreadableImage(path, "extreme aspect ratio", f"a side ratio of at most {_MAX_ASPECT}")
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise _too_large(path)


def _too_large(path: str | Path) -> UnreadableImage:
    return UnreadableImage(path, "image too large", f"at most {Image.MAX_IMAGE_PIXELS:,} pixels")


def _voi(values: np.ndarray, dataset) -> np.ndarray:
    """The values of interest as uint8: by the file's VOI LUT, else by its first window, else by percentiles."""
    if dataset.get("VOILUTSequence"):
        # pydicom's apply_voi keeps the indices in the entries' dtype, so an 8-bit LUT of 4,096 entries wraps around.
        lut = dataset.VOILUTSequence[0]
        _, first, _ = lut.LUTDescriptor
        table = np.frombuffer(lut.LUTData, "<u2") if isinstance(lut.LUTData, bytes) else np.asarray(lut.LUTData)
        index = np.clip(np.rint(values) - float(first), 0, len(table) - 1).astype(np.int64)
        return _scale(table[index], table.min(), table.max())
    if dataset.get("WindowWidth") and dataset.get("WindowCenter") is not None:
        from pydicom.pixels import apply_windowing

        ends = apply_windowing(np.array([-1e9, 1e9]), dataset)  # what the window's dark and bright ends come out as
        return _scale(apply_windowing(values, dataset), *ends)
    return _percentile_window(values)


def _percentile_window(values: np.ndarray) -> np.ndarray:
    return _scale(values, *np.percentile(values, _PERCENTILES))


def _scale(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """`low` to 0 and `high` to 255 (low > high inverts); all zero where they are equal."""
    if low == high:
        return np.zeros(values.shape, np.uint8)
    scaled = (values.astype(np.float32) - np.float32(low)) / np.float32(high - low)
    return np.rint(255 * scaled.clip(0, 1)).astype(np.uint8)


def _resize(image: np.ndarray, short_side: int) -> np.ndarray:
    height, width = image.shape
    scale = short_side / min(height, width)
    size = (max(short_side, round(width * scale)), max(short_side, round(height * scale)))
    # Pillow widens the bilinear kernel with the reduction, so this is antialiased.
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
