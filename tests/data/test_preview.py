import base64
import io
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from clinvla_fast.data.preview import write_preview
from clinvla_fast.data.shards import Box, Study, write_shards
from clinvla_fast.errors import DataError


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)

    def study(number):
        views = {"frontal": (96, 128)} | ({"lateral": (64, 64), "prior_frontal": (70, 64)} if number % 2 else {})
        images = {view: rng.integers(60, 256, shape, np.uint8) for view, shape in views.items()}
        report = f"Finding <b>number</b> {number} & $x_1$.\nNo {'effusion ' * 30}seen."
        where = {"frontal": (0.25, 0.25, 0.5, 0.5), "lateral": (0.5, 0.5, 0.5, 0.25)}
        boxes = tuple(Box("edema", view, *where[view]) for view in where) if number == 1 else ()
        labels = ("edema",) if number < 6 else ("pneumonia", "<fracture>")
        given = (report, images, labels, boxes, (("edema", "worsening"),) if number == 1 else ())
        return Study(f"secret-study-{number}", f"secret-patient-{number}", "train", *given)

    write_shards(
        {"train": range(8)}, lambda number: [study(number)], tmp_path / "data", source="csv", settings={}, workers=1
    )
    return tmp_path / "data"


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.images, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attributes))

    def handle_data(self, data):
        self.texts.append(data)


def pixels(image):
    data = image["src"].removeprefix("data:image/jpeg;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)


def test_page_shows_views_patches_labels_and_report(root, tmp_path):
    write_preview(root, tmp_path / "out.html", split="train", count=4)
    text = (tmp_path / "out.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "secret" not in text and not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"https?://|url\(", text)  # nothing is fetched
    assert page.tags.count("section") == 4
    # The label sets in turn: 0, 1 of the first six and 6, 7; odd ones have a lateral and a prior.
    assert [h for h in page.texts if h.startswith("study ")] == ["study 0", "study 1", "study 6", "study 7"]
    assert len(page.images) == 2 * 2 + 2 * 5
    assert {"edema ", "edema: worsening ", "pneumonia, <fracture> "} <= set(page.texts)
    assert any("<b>number</b> 7 & $x_1$" in t for t in page.texts)
    assert [image["alt"].split(",")[0] for image in page.images[2:7]] == (
        ["frontal", "frontal", "lateral", "lateral", "prior frontal"]
    )
    assert (page.images[0]["width"], page.images[0]["height"]) == ("128", "96")


@pytest.mark.parametrize("keep", [0.0, 0.25, 1.0])
def test_masked_patches_are_dimmed(root, tmp_path, keep):
    write_preview(root, tmp_path / "out.html", split="train", count=1, keep=keep)
    _, seen = map(pixels, Page((tmp_path / "out.html").read_text(encoding="utf-8")).images)
    assert seen.shape == (224, 224)
    bright = seen.reshape(14, 16, 14, 16).mean((1, 3)) > 90
    assert bright.sum() == round(keep * 196)


def test_the_same_seed_gives_the_same_page(root, tmp_path):
    texts = []
    for seed in (1, 1, 2):
        write_preview(root, tmp_path / "out.html", split="train", seed=seed)
        texts.append((tmp_path / "out.html").read_bytes())
    assert texts[0] == texts[1] != texts[2]


def test_boxes_are_outlined(root, tmp_path):
    write_preview(root, tmp_path / "out.html", split="train", count=4)
    first, _, second, _, lateral, *_ = map(pixels, Page((tmp_path / "out.html").read_text(encoding="utf-8")).images)
    for image, outlined in ((first, False), (second, True)):
        assert (image[24:72, 32].mean() > 235) == (image[24, 32:96].mean() > 235) == outlined
    assert lateral[32:48, 32].mean() > 235 and lateral[32, 32:].mean() > 235 and lateral[16:48, 16].mean() < 200


def test_picture(root, tmp_path):
    write_preview(root, tmp_path / "out.PNG", split="train", count=5)
    content = (tmp_path / "out.PNG").read_bytes()
    assert content.startswith(b"\x89PNG") and 10_000 < len(content) < 900_000


def test_refused(root, tmp_path):
    for name, options, message in [
        ("out.pdf", {}, r"ends in \.html or \.png"),
        ("out.html", {"split": "test"}, "no studies in its 'test' split"),
        ("out.html", {"count": 0}, "0 studies"),
        ("out.html", {"keep": 1.5}, "keep 1.5"),
    ]:
        with pytest.raises(DataError, match=message):
            write_preview(root, tmp_path / name, **{"split": "train"} | options)
    assert not (tmp_path / "out.html").exists()


def test_importing_it_does_not_wait_for_torch():
    code = "import sys, clinvla_fast.data.preview; assert not {'torch', 'matplotlib', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
