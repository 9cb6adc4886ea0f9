"""Pictures of a page that needs nothing else: films, maps over them and curves as data URIs."""

import base64
import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

_SIDE = 224  # pixels: of a film's longer side
_OPAQUE = 0.6  # of a map where it is highest
_BOX, _PEAK = (0, 255, 255), (255, 255, 255)

Box = Sequence[float]  # left, top, width, height as shares of the image's sides


def film(pixels: np.ndarray, side: int = _SIDE) -> str:
    """Grey levels or colours, uint8 [H, W] or [H, W, 3], of at most `side` pixels a side, as a data URI."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.BILINEAR)
    return _jpeg(image)


def heated(pixels: np.ndarray, heat: np.ndarray, scale: tuple[float, float], boxes: Sequence[Box] = ()) -> str:
    """A film under a map, as a data URI: clear where it is low, yellow where it is high, a cross where it is highest,
    and boxes outlined.

    Args:
        pixels: uint8 [H, W].
        heat: float32 [rows, columns] over the whole film; upsampled bilinearly.
        scale: the lowest and highest value of the colours.
    """
    height, width = (round(_SIDE * side / max(pixels.shape)) for side in pixels.shape)
    fine = np.asarray(Image.fromarray(heat).resize((width, height), Image.Resampling.BILINEAR))
    share = np.clip((fine - scale[0]) / max(scale[1] - scale[0], 1e-12), 0, 1)[..., None]
    colours = matplotlib.colormaps["inferno"](share[..., 0])[..., :3] * 255
    grey = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))[..., None]
    strength = _OPAQUE * share**2  # what is low stays a film
    image = Image.fromarray(np.uint8((1 - strength) * grey + strength * colours))
    draw = ImageDraw.Draw(image)
    for left, top, across, down in boxes:
        corners = (left * width, top * height, (left + across) * width - 1, (top + down) * height - 1)
        draw.rectangle([round(x) for x in corners], outline=_BOX, width=2)
    row, column = np.unravel_index(int(heat.argmax()), heat.shape)
    x, y = round((column + 0.5) / heat.shape[1] * width), round((row + 0.5) / heat.shape[0] * height)
    for line in ((x - 6, y, x + 6, y), (x, y - 6, x, y + 6)):
        draw.line(line, fill=_PEAK, width=2)
    return _jpeg(image)


def drawing(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _jpeg(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=80, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
