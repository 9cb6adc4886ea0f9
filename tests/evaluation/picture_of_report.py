"""The picture of a report in the README: its headline and an example of each kind, as a browser shows them.

python tests/evaluation/picture_of_report.py runs/001/evaluation/report.html docs/report.png
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

_MARGIN = 16


def main(report: Path, out: Path) -> None:
    """Write the picture: the headline at the left, examples at the right."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        left = _parts(browser.new_page(), report, 660, ["section[aria-labelledby=glance]"])
        query = "h3:has-text('text to image') + .query"
        examples = [f"section[aria-labelledby={task}] .example" for task in ("grounding", "reconstruction")]
        right = _parts(browser.new_page(), report, 780, [query, *examples])
        browser.close()
    columns = [_below(left), _below(right)]
    width = sum(column.width for column in columns) + 3 * _MARGIN
    picture = Image.new("RGB", (width, max(column.height for column in columns) + 2 * _MARGIN), "white")
    x = _MARGIN
    for column in columns:
        picture.paste(column, (x, _MARGIN))
        x += column.width + _MARGIN
    picture.quantize(256).save(out, optimize=True)


def _parts(page: Page, report: Path, width: int, selectors: list[str]) -> list[Image.Image]:
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(report.resolve().as_uri())
    return [Image.open(io.BytesIO(page.locator(selector).first.screenshot())) for selector in selectors]


def _below(parts: list[Image.Image]) -> Image.Image:
    """One picture below the other."""
    height = sum(part.height + _MARGIN for part in parts) - _MARGIN
    column = Image.new("RGB", (max(part.width for part in parts), height), "white")
    y = 0
    for part in parts:
        column.paste(part, (0, y))
        y += part.height + _MARGIN
    return column


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
