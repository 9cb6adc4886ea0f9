"""Chest radiographs from PNG, JPEG and DICOM files, as 8-bit gray with air dark."""

import io
import logging
import math
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import imagecodecs
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import DataError
from .files import FileTooLarge, read_file
from .quality import Quality

# Every reason an UnreadableImage has.
REASONS = frozenset(
    {
        *("file is missing", "file cannot be read", "not an image", "truncated image", "image too large"),
        *("extreme aspect ratio", "not a chest radiograph", "multi-frame DICOM", "colour DICOM"),
        *("no decoder for this DICOM", "blank image", "over-exposed", "motion-blurred"),
    }
)

# RG is computed radiography's older name. A blank tag says nothing against the image.
_MODALITIES = ("CR", "DX", "RG", "")
_BODY_PARTS = ("CHEST", "THORAX", "TORAX", "TORACE", "LUNG")
_PERCENTILES = (0.5, 99.5)
_MAX_ASPECT = 4
_MAX_BYTES = 512 * 2**20  # a file, or what is in a deflated one
_CROP_SIDE, _JUDGED_SIDE, _OCR_SIDE = 256, 256, 1024  # short sides at which borders, quality and text are looked for
_TEXT_MARGIN = 0.25  # share of the height or width
_DARK, _BRIGHT, _UNIFORM = 40, 215, 16  # gray levels: what a border is at most or at least, and how much it varies
_MAX_SCANS = 100  # of a progressive JPEG, each of which redraws the whole image; encoders make ten or so
# What a PNG may hold beside its pixels without a say in how they are shown.
_PLAIN_CHUNKS = {b"IHDR", b"IDAT", b"IEND", b"pHYs", b"tIME", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"bKGD"}

# Only these are parsed, so nothing that names the patient can reach a message.
_TAGS = [
    *("Modality", "BodyPartExamined", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"),
    *("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData"),
    *("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept"),
    *("VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction"),
]

Counts = Callable[[], np.ndarray]  # how often each of some values occurs, int64, in their order
Gray = Callable[[np.ndarray, Counts | None], np.ndarray]  # values to gray levels, uint8


@dataclass(frozen=True)
class Reading:
    """How radiographs are read. Made JSON by `dataclasses.asdict`.

    window: width and level in the DICOM's modality units, in place of the file's own VOI: `level - width / 2` comes out
        as 0, `level + width / 2` as 255. The paper's 1500, -500 (ClinVLA, section 4.1.1) is a window of CT numbers,
        which radiographs seldom hold. Pictures have no modality units and keep their values.
    crop_borders: whether the dark or bright bands that a collimator leaves around the film are cut off.
    fill_text: whether text that OCR finds near the edges is filled from its neighbourhood. Side markers go with it.
    quality: drops films by what is measured on them.
    """

    window: tuple[float, float] | None = None
    crop_borders: bool = False
    fill_text: bool = False
    quality: Quality | None = None

    def __post_init__(self):
        if self.window is not None and not (self.window[0] > 0 and all(map(math.isfinite, self.window))):
            raise DataError(f"The window is {self.window}: expected a width above 0 and a level.")


class UnreadableImage(DataError):
    """An image that cannot be used.

    The message names the file, the reason and what was expected; `reason` is the bare category, for counting: one of
    REASONS.
    """

    def __init__(self, path: str | Path, reason: str, expected: str):
        super().__init__(path, reason, expected)
        self.reason = reason

    def __str__(self) -> str:
        path, reason, expected = self.args
        return f"{path}: {reason}; expected {expected}."


def read_radiograph(path: str | Path, short_side: int = 256, options: Reading = Reading()) -> np.ndarray:
    """The radiograph at `path`, its short side resized to exactly `short_side`.

    8-bit PNG and JPEG keep their values. 16-bit PNG is windowed to its 0.5 to 99.5 percentiles. DICOM goes through
    its modality LUT, then its VOI LUT or window (the percentiles if it has neither), and MONOCHROME1 is inverted.
    Then, by `options`, borders are cropped, text is filled and the quality is judged.

    Returns:
        uint8 [H, W], min(H, W) == short_side.

    Raises:
        UnreadableImage: if the file is missing, damaged, blank, or is no single gray chest radiograph, or `options`
            find it of too little quality.
        DataError: if a library is missing: pydicom and the file is DICOM, or rapidocr and text is to be filled.
    """
    content = _content(path)
    if content[128:132] == b"DICM" or Path(path).suffix.lower() in (".dcm", ".dicom"):
        image = Image.fromarray(_read_dicom(path, content, options.window))
    else:
        least = max(short_side, _JUDGED_SIDE if options.quality else 0)
        least *= 5 if options.crop_borders else 2  # cropping may leave 0.4 of a side
        image = _read_picture(path, content, max(least, _OCR_SIDE if options.fill_text else 0))
    if _blank(image):
        raise UnreadableImage(path, "blank image", "more than one gray level")
    if options.crop_borders:
        image = Image.fromarray(crop_borders(np.asarray(image)))
        _check_size(path, *image.size)
    if options.fill_text:
        image = Image.fromarray(fill_text(np.asarray(image)))
    resized = _resize(image, short_side)
    if options.quality:
        judged = resized if short_side >= _JUDGED_SIDE else _resize(image, _JUDGED_SIDE)
        reason = options.quality.reason(judged)
        if reason:
            raise UnreadableImage(path, reason, "a film within the limits of quality that were set")
    return resized


def _content(path: str | Path) -> bytes:
    try:
        return read_file(path, _MAX_BYTES)
    except FileTooLarge:
        raise UnreadableImage(path, "image too large", f"a file of at most {_MAX_BYTES >> 20} MiB") from None
    except FileNotFoundError:
        raise UnreadableImage(path, "file is missing", "a PNG, JPEG or DICOM file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise UnreadableImage(path, "file cannot be read", f"a readable file ({type(error).__name__})") from None


def _read_picture(path: str | Path, content: bytes, least_side: int) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
                _check_size(path, *image.size)
                if image.format == "JPEG" and content.count(b"\xff\xda") > _MAX_SCANS:
                    raise UnreadableImage(path, "image too large", f"at most {_MAX_SCANS} scans")
                if image.format == "PNG" and image.mode == "L" and (pixels := _plain_png(content)) is not None:
                    return Image.fromarray(pixels)
                image.draft("L", (least_side, least_side))  # JPEG decodes several times faster when scaled inside
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                if image.mode.startswith("I"):
                    return Image.fromarray(_looked_up(np.asarray(image), _percentile_window))
                return image if image.mode == "L" else image.convert("L")
        except DataError:
            raise
        except UnidentifiedImageError:
            raise UnreadableImage(path, "not an image", "PNG, JPEG or DICOM") from None
        except (Image.DecompressionBombError, MemoryError):
            raise _too_large(path) from None
        except Exception:  # damaged bytes raise anything in Pillow: OSError, SyntaxError, struct.error, zlib.error, ...
            raise UnreadableImage(path, "truncated image", "a whole PNG or JPEG file") from None


def _plain_png(content: bytes) -> np.ndarray | None:
    """An 8-bit gray PNG's pixels, a quarter faster than Pillow has them; None where it is damaged, or says more of how
    it is to be shown: Pillow sees to these.

    Checksums are compared here first: every damaged file that imagecodecs meets costs CPython one reference to None,
    and without any Python ends.
    """
    at, kinds = 8, set()
    try:
        while b"IEND" not in kinds:
            length, kind = struct.unpack_from(">I4s", content, at)
            end = at + 8 + length
            if zlib.crc32(memoryview(content)[at + 4 : end]) != int.from_bytes(content[end : end + 4]):
                return None
            at = end + 4
            kinds.add(kind)
        if not kinds <= _PLAIN_CHUNKS:
            return None
        pixels = imagecodecs.png_decode(content)
    except (struct.error, imagecodecs.PngError):
        return None
    return pixels if pixels.ndim == 2 and pixels.dtype == np.uint8 else None


def _read_dicom(path: str | Path, content: bytes, window: tuple[float, float] | None) -> np.ndarray:
    try:
        import pydicom
        from pydicom.pixels import apply_modality_lut
    except ImportError:
        raise DataError(f'{path} is a DICOM file: pip install "clinvla-fast[dicom]" to read it.') from None
    with _pydicom_quiet():
        try:
            _check_deflated(path, content)
            dataset = pydicom.dcmread(io.BytesIO(content), force=True, specific_tags=_TAGS)
            _check_dicom(path, dataset)
            # A file without its header is in DICOM's default transfer syntax.
            dataset.file_meta.setdefault("TransferSyntaxUID", pydicom.uid.ImplicitVRLittleEndian)
            inverted = dataset.PhotometricInterpretation == "MONOCHROME1"

            def gray(stored: np.ndarray, counts: Counts | None) -> np.ndarray:
                shown = _voi(apply_modality_lut(stored, dataset), counts, dataset, window)
                return 255 - shown if inverted else shown

            return _looked_up(_stored_values(path, dataset), gray)
        except DataError:
            raise
        except MemoryError:
            raise _too_large(path) from None
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # damaged bytes raise anything in pydicom and its decoders, with tag values in the text
            raise UnreadableImage(path, "truncated image", "a whole DICOM file with decodable pixels") from None


@contextmanager
def _pydicom_quiet() -> Iterator[None]:
    """pydicom warns and logs with the values of tags in the text."""
    logger = logging.getLogger("pydicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _check_deflated(path: str | Path, content: bytes) -> None:
    """pydicom inflates a whole file at once, so its size has to be known first."""
    if b"1.2.840.10008.1.2.1.99" in content[:1024]:
        rest, size = content[144 + struct.unpack_from("<I", content, 140)[0] :], 0
        inflating = zlib.decompressobj(-zlib.MAX_WBITS)
        while rest and size <= _MAX_BYTES:
            size += len(inflating.decompress(rest, 2**24))
            rest = inflating.unconsumed_tail
        if size > _MAX_BYTES:
            raise UnreadableImage(path, "image too large", f"a file of at most {_MAX_BYTES >> 20} MiB once inflated")


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
    if dataset.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2") or dataset.SamplesPerPixel != 1:
        raise UnreadableImage(path, "colour DICOM", "MONOCHROME1 or MONOCHROME2")
    _check_size(path, dataset.Columns, dataset.Rows)


def _stored_values(path: str | Path, dataset) -> np.ndarray:
    """The pixels as they are stored, by the decoder that is safe with damaged files.

    GDCM is never asked: damaged JPEGs make it abort the whole process.
    """
    from pydicom.encaps import get_frame
    from pydicom.pixels import get_decoder
    from pydicom.uid import JPEGLSTransferSyntaxes, JPEGTransferSyntaxes

    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_transfer_syntax:  # what is unknown could be anything: it is not shown
        raise UnreadableImage(path, "no decoder for this DICOM", "a transfer syntax that the standard names")
    if not syntax.is_encapsulated:
        return dataset.pixel_array
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    if syntax.name != "RLE Lossless" and _coded_size(frame) != (dataset.Rows, dataset.Columns, 1):
        # Decoders allocate what the coded image asks for, and some write as much as it holds.
        raise UnreadableImage(path, "truncated image", "one coded image of the size in the DICOM's tags")
    if syntax in JPEGTransferSyntaxes + JPEGLSTransferSyntaxes:
        decode = imagecodecs.jpegls_decode if syntax in JPEGLSTransferSyntaxes else imagecodecs.jpeg8_decode
        values = decode(frame)
        if dataset.PixelRepresentation:  # two's complement of BitsStored bits
            unused = 8 * values.itemsize - dataset.BitsStored
            values = (values << unused).view(f"i{values.itemsize}") >> unused
        return values
    try:
        installed = get_decoder(syntax).available_plugins
    except NotImplementedError:  # video
        installed = ()
    plugins = [name for name in ("pylibjpeg", "pillow", "pydicom") if name in installed]
    if not plugins:
        raise _no_decoder(path, syntax)
    dataset.pixel_array_options(decoding_plugin=plugins[0])
    return dataset.pixel_array


def _no_decoder(path: str | Path, syntax) -> UnreadableImage:
    expected = f'a transfer syntax with an installed decoder, not {syntax.name} (pip install "clinvla-fast[dicom]")'
    return UnreadableImage(path, "no decoder for this DICOM", expected)


def _coded_size(frame: bytes) -> tuple[int, int, int]:
    """Rows, columns and components in the header of a JPEG, JPEG-LS or JPEG 2000 codestream.

    Raises:
        ValueError, struct.error, IndexError: if there is none.
    """
    start = frame.find(b"\xff\x4f\xff\x51", 0, 4096)  # SOC and SIZ of JPEG 2000; some files wrap it in JP2's boxes
    if start >= 0:
        right, bottom, left, top = struct.unpack_from(">4I", frame, start + 8)
        return bottom - top, right - left, struct.unpack_from(">H", frame, start + 40)[0]
    if frame[:2] != b"\xff\xd8":
        raise ValueError
    place = 2
    while True:
        if frame[place] != 0xFF:
            raise ValueError
        marker = frame[place + 1]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):  # SOF55 is JPEG-LS's
            return struct.unpack_from(">HHB", frame, place + 5)
        place += 1 if marker == 0xFF else 2 + struct.unpack_from(">H", frame, place + 2)[0]


def _check_size(path: str | Path, width: int, height: int) -> None:
    if max(width, height) > _MAX_ASPECT * min(width, height):
        raise UnreadableImage(path, "extreme aspect ratio", f"a side ratio of at most {_MAX_ASPECT}")
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise _too_large(path)


def _too_large(path: str | Path) -> UnreadableImage:
    return UnreadableImage(path, "image too large", f"at most {Image.MAX_IMAGE_PIXELS:,} pixels")


def _looked_up(stored: np.ndarray, gray: Gray) -> np.ndarray:
    """`gray` of the stored values, uint8. Of 8 and 16 bits it is asked for each possible value once."""
    stored = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    if stored.dtype.kind not in "iu" or stored.dtype.itemsize > 2:
        return gray(stored, None)
    codes = stored.view(f"u{stored.dtype.itemsize}")
    values = np.arange(256**codes.dtype.itemsize, dtype=codes.dtype)
    # In pieces, since NumPy makes int64 of all that it counts or looks up.
    pieces = [slice(start, start + 2**18) for start in range(0, codes.size, 2**18)]
    codes, image = codes.ravel(), np.empty(codes.shape, np.uint8)

    def counts() -> np.ndarray:
        return sum(np.bincount(codes[piece], minlength=len(values)) for piece in pieces)

    table = gray(values.view(stored.dtype), counts)
    for piece in pieces:
        np.take(table, codes[piece], out=image.reshape(-1)[piece], mode="clip")
    return image


def _blank(image: Image.Image) -> bool:
    """Whether the percentiles of `image` (8 bits) are equal, which is when at most 1% of it differs from some level."""
    width, height = image.size
    middle = image.crop((0, height // 2, width, height // 2 + -(-height // 16)))  # all of it takes a while to count
    few = middle.histogram()
    if max(few) < 0.8 * sum(few):  # so more than 1% of all differ
        return False
    low, high = _percentiles(np.arange(256), np.array(image.histogram()))
    return low == high


def _voi(values: np.ndarray, counts: Counts | None, dataset, window: tuple[float, float] | None) -> np.ndarray:
    """The values of interest as uint8: by `window`, else the file's VOI LUT, its first window, or percentiles."""
    if window:
        width, level = window
        return _scale(values, level - width / 2, level + width / 2)
    if dataset.get("VOILUTSequence"):
        # pydicom's apply_voi keeps the indices in the entries' dtype, so an 8-bit LUT of 4,096 entries wraps around.
        lut = dataset.VOILUTSequence[0]
        entries, first, _ = lut.LUTDescriptor
        table = np.asarray(lut.LUTData) if not isinstance(lut.LUTData, bytes) else _entries(lut.LUTData, entries)
        index = np.clip(np.rint(values) - float(first), 0, len(table) - 1).astype(np.int64)
        return _scale(table[index], table.min(), table.max())
    if _has_window(dataset):
        from pydicom.pixels import apply_windowing

        ends = apply_windowing(np.array([-1e9, 1e9]), dataset)  # what the window's dark and bright ends come out as
        return _scale(apply_windowing(values, dataset), *ends)
    return _percentile_window(values, counts)


def _entries(data: bytes, entries: int) -> np.ndarray:
    """The entries of a look-up table: words, or two to a word where they have 8 bits. 0 entries are 65,536."""
    packed = len(data) < 2 * (entries or 65_536)
    return np.frombuffer(data, np.uint8 if packed else "<u2")[: entries or 65_536]


def _has_window(dataset) -> bool:
    """Whether the first window is one: PS3.3 C.11.2.1.2 asks for a width of 1 and more, or above 0."""
    width, centre = dataset.get("WindowWidth"), dataset.get("WindowCenter")
    if width is None or centre is None or width == [] or centre == []:
        return False
    width = width[0] if isinstance(width, Sequence) and not isinstance(width, str) else width
    linear = str(dataset.get("VOILUTFunction") or "LINEAR") == "LINEAR"
    return float(width) >= 1 if linear else float(width) > 0


def _percentile_window(values: np.ndarray, counts: Counts | None) -> np.ndarray:
    if counts is None:
        return _scale(values, *np.percentile(values, _PERCENTILES))
    return _scale(values, *_percentiles(values, counts()))


def _percentiles(values: np.ndarray, counts: np.ndarray) -> list[float]:
    """np.percentile at _PERCENTILES, to the last bit, of `values` [N] that occur `counts` [N] times each."""
    order = np.argsort(values, kind="stable")
    ends = np.cumsum(counts[order])
    found = []
    for percentile in _PERCENTILES:
        place = (ends[-1] - 1) * (percentile / 100)
        share = place - np.floor(place)
        places = [np.floor(place), min(np.floor(place) + 1, ends[-1] - 1)]
        below, above = values[order[np.searchsorted(ends, places, side="right")]].astype(np.float64)
        step = above - below
        found.append(float(below + step * share if share < 0.5 else above - step * (1 - share)))
    return found


def _scale(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """`low` to 0 and `high` to 255 (low > high inverts); all zero where they are equal."""
    if low == high:
        return np.zeros(values.shape, np.uint8)
    scaled = (values.astype(np.float32) - np.float32(low)) / np.float32(high - low)
    return np.rint(255 * scaled.clip(0, 1)).astype(np.uint8)


def crop_borders(image: np.ndarray) -> np.ndarray:
    """`image` (uint8 [H, W]) without the bands that a collimator's shutters leave, or `image` itself if it has none.

    A band is made of whole lines, from the edge inwards, that are all dark or all bright (four fifths of each line
    within a few gray levels: a marker may lie on it), and it ends in a straight edge: just inside, at least half of the
    line differs. So the air beside a body stays, whose edge is curved. At most 0.3 of the height or width is cut off a
    side, and what is cut is exact to about 1/256 of the short side.
    """
    small = _resize(Image.fromarray(image), _CROP_SIDE).astype(np.int16)
    top, bottom = _band(small), _band(small[::-1])
    left, right = _band(small.T), _band(small.T[::-1])
    inner = small[top : len(small) - bottom, left : small.shape[1] - right]
    if not inner.size:
        return image
    across, down = small[:, left : small.shape[1] - right], small[top : len(small) - bottom].T
    height, width = image.shape
    top, bottom = _cut(across, top, height), _cut(across[::-1], bottom, height)
    left, right = _cut(down, left, width), _cut(down[::-1], right, width)
    return np.ascontiguousarray(image[top : height - bottom, left : width - right])


def _band(lines: np.ndarray) -> int:
    """How many lines from the first are uniformly dark or bright."""
    ordered = np.sort(lines, axis=1)
    low, high = ordered[:, lines.shape[1] // 10], ordered[:, -1 - lines.shape[1] // 10]
    uniform = (high - low <= _UNIFORM) & ((high <= _DARK) | (low >= _BRIGHT))
    return int(np.argmin(np.append(uniform, False)))


def _cut(lines: np.ndarray, band: int, side: int) -> int:
    """Pixels of `side` to cut off for the first `band` lines: 0 where they do not end in a straight edge."""
    if not band or band + 4 > len(lines):
        return 0
    differs = abs(lines[band + 3] - np.median(lines[band - 1])) > _UNIFORM
    if differs.mean() < 0.5:
        return 0
    return min(math.ceil((band + 1) * side / len(lines)), int(0.3 * side))


def fill_text(image: np.ndarray) -> np.ndarray:
    """`image` (uint8 [H, W]) with the text near its edges filled from its neighbourhood; elsewhere it is unchanged.

    OCR looks at the image at a short side of at most 1,024, where letters should be 10 pixels high or more, three times
    at most while it still finds something. What it reads with a confidence of 0.5 or more, centred within a quarter of
    the height or width from an edge, is filled (Telea 2004). Side markers that it can read go too: a model can learn
    the hospital from their look.

    Raises:
        DataError: if rapidocr-onnxruntime is not installed.
    """
    ocr = _ocr(os.getpid())
    for _ in range(3):
        boxes = _text_boxes(ocr, image)
        if not boxes:
            break
        image = image.copy()
        for box in boxes:
            _fill(image, box)
    return image


@cache
def _ocr(process: int):
    """One a process: its threads would not outlive a fork."""
    try:
        from rapidocr_onnxruntime import RapidOCR
    except ImportError:
        raise DataError('Filling text needs OCR: pip install "clinvla-fast[ocr]" (Python 3.11 or 3.12).') from None
    for name in ("RapidOCR", "OrtInferSession"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1)


def _text_boxes(ocr, image: np.ndarray) -> list[tuple[int, int, int, int]]:
    """(left, top, right, bottom) of each text near an edge, with a margin; ends excluded."""
    height, width = image.shape
    shown = _resize(Image.fromarray(image), _OCR_SIDE) if min(image.shape) > _OCR_SIDE else image
    scale = np.array([width / shown.shape[1], height / shown.shape[0]])
    boxes = []
    for corners, _, _ in ocr(shown)[0] or ():
        corners = np.array(corners) * scale
        (left, top), (right, bottom) = corners.min(0), corners.max(0)
        x, y = (left + right) / 2 / width, (top + bottom) / 2 / height
        if min(x, 1 - x, y, 1 - y) <= _TEXT_MARGIN:
            # Boxes tend to miss part of the first and last letter.
            line = min(right - left, bottom - top)
            across, down = (line, line / 4) if right - left > bottom - top else (line / 4, line)
            boxes.append(
                (
                    max(0, int(left - across)),
                    max(0, int(top - down)),
                    min(width, math.ceil(right + across)),
                    min(height, math.ceil(bottom + down)),
                )
            )
    return boxes


def _fill(image: np.ndarray, box: tuple[int, int, int, int]) -> None:
    """Fill the box in place from what surrounds it."""
    import cv2

    left, top, right, bottom = box
    around = slice(max(0, top - 8), bottom + 8), slice(max(0, left - 8), right + 8)
    mask = np.zeros_like(image)
    mask[top:bottom, left:right] = 1
    mask = mask[around]
    image[around] = np.where(mask, cv2.inpaint(image[around], mask, 3, cv2.INPAINT_TELEA), image[around])


def _resize(image: Image.Image, short_side: int) -> np.ndarray:
    width, height = image.size
    scale = short_side / min(height, width)
    size = (max(short_side, round(width * scale)), max(short_side, round(height * scale)))
    # Pillow widens the bilinear kernel with the reduction, so this is antialiased.
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR))
