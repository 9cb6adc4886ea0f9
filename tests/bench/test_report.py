"""The documents' figures are those that are stored, and pictures are drawn of what is."""

import json
import re

import pytest

from bench import pictures, report

NAMES = [str(path.relative_to(report.ROOT)) for path in report.documents()]
NO_FIGURES = re.compile(r"```.*?```|`[^`]*`|<!--.*?-->|\]\([^)]*\)|^## Papers.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
VERSIONS = {"3.11"}


@pytest.mark.parametrize("name", NAMES)
def test_a_document_quotes_what_is_stored(name):
    """If not: `python -m bench.report` writes it anew."""
    text = (report.ROOT / name).read_text()
    assert report.filled(text) == text


@pytest.mark.parametrize("name", NAMES)
def test_no_figure_is_typed_by_hand(name):
    """A decimal number in prose is followed by where it is stored, or is in a generated table."""
    text = report.BLOCK.sub("", (report.ROOT / name).read_text())
    text = NO_FIGURES.sub("", report.FIGURE.sub("", text))
    assert set(re.findall(r"(?<![-\w.])\d+\.\d+\b(?!\.)", text)) <= VERSIONS


@pytest.fixture
def stored(tmp_path, monkeypatch):
    results = {
        "ratios": {"fast": {"value": 2.467, "noise": 0.04, "runs": [2.4, 2.5]}},
        "figures": {"flops": 95_203_000},
    }
    (tmp_path / "device").mkdir()
    (tmp_path / "device/area.json").write_text(json.dumps({"results": {"test_x[a b]": results}}))
    monkeypatch.setattr(report, "RESULTS", tmp_path)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("9.99<!--=device/area::test_x[a b]::fast-->", "2.47<!--=device/area::test_x[a b]::fast-->"),
        (
            "1<!--=device/area::test_x[a b]::fast::noise*1e3--> %",
            "40<!--=device/area::test_x[a b]::fast::noise*1e3--> %",
        ),
        ("0<!--=device/area::test_x[a b]::flops-->", "95,203,000<!--=device/area::test_x[a b]::flops-->"),
        ("+0.1<!--=device/area::test_x[a b]::flops*1e-9-->", "+0.1<!--=device/area::test_x[a b]::flops*1e-9-->"),
        ("2.1 times 3.0", "2.1 times 3.0"),
    ],
)
def test_a_figure_keeps_its_digits(stored, before, after):
    assert report.filled(before) == after


def test_a_figure_that_is_not_stored_is_an_error(stored):
    with pytest.raises(KeyError):
        report.filled("1.0<!--=device/area::test_x[a b]::slow-->")


def test_pictures_of_what_is_there(tmp_path):
    device = tmp_path / "device"
    device.mkdir()
    assert not list(pictures.draw(device, tmp_path / "out"))
    ratios = {f"{n} step {n}": {"value": n, "noise": 0.1, "runs": [n]} for n in (1, 2, 10)}
    (device / "waterfall.json").write_text(json.dumps({"results": {"test_encoding": {"ratios": ratios}}}))
    figures = {"flops": 100, "bytes": 10, "of_matrix_rate": 0.5, "of_bandwidth": 0.5}
    (device / "kernels.json").write_text(json.dumps({"results": {"test_speed[one]": {"figures": figures}}}))
    drawn = {path.name for path in pictures.draw(device, tmp_path / "out")}
    assert drawn == {"device-waterfall.png", "device-roofline.png"}


def test_what_grows_with_the_batch_is_drawn_for_each_way(tmp_path):
    peaks = {"1": {"ours": 10**9}, "256": {"ours": 10**10, "plain": 4 * 10**10}}
    stored = {"towers": {"test_memory": {"figures": {"peak_bytes_by_batch": peaks}}}}
    (axes,) = pictures.PICTURES["memory"](stored).axes
    lines = {line.get_label(): [*zip(*line.get_data(), strict=True)] for line in axes.lines}
    assert lines == {"ours": [(1, 1.0), (256, 10.0)], "plain": [(256, 40.0)]}
