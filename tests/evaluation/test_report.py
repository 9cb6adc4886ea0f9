"""A page that people look at: what is in it, what a browser makes of it, and what it must never hold."""

import base64
import hashlib
import io
import json
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from clinvla_fast.data.shards import Study, write_shards
from clinvla_fast.errors import DataError
from clinvla_fast.evaluation.report import write_report
from clinvla_fast.evaluation.result import Result, read_result, write_result
from clinvla_fast.evaluation.score import Score

STUDIES, BOX = 12, [0.1, 0.2, 0.3, 0.4]
ATTACK = "<script>document.title = 'taken'</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Films whose reports and labels try to be HTML."""
    rng = np.random.default_rng(0)

    def study(number):
        images = {view: rng.integers(0, 256, (96, 80), np.uint8) for view in ("frontal", "lateral")}
        report = f"{ATTACK} Report of number {number}. " + "The lungs are clear. " * 20
        labels = ("edema", "<b>nodule</b>") if number % 2 else ("nodule",)
        return Study(f"secret-study-{number}", f"secret-patient-{number // 2}", "test", report, images, labels)

    root = tmp_path_factory.mktemp("data") / "prepared"
    write_shards({"test": range(STUDIES)}, lambda n: [study(n)], root, source="csv", settings={}, workers=1)
    return root


def score(name, seed, mean=0.5, chance=0.1, **given):
    rows = {"value": np.random.default_rng(seed).normal(mean, 0.1, 200)}
    return Score(name, "mean", rows, np.arange(200), np.arange(200) // 2, chance, **given)


def evaluated(run, data, seed=0, split="test", tasks=("retrieval", "grounding", "odd")):
    """A run's folder with results, as the tasks write them."""
    run.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    found = {
        "retrieval": Result(
            "retrieval",
            [score("text to image, precision@5", seed, 0.5 + 0.2 * seed), score("a <b>score</b>", seed, chance=None)],
            {"rerank": 0, "prompts": ATTACK},
            {
                "galleries": [
                    {"way": way, "label": "edema", "query": 3, "results": [
                        {"place": place, "score": 0.9 - 0.123 * place, "right": right}
                        for place, right in ((1, True), (2, False), (4, True))
                    ]}
                    for way in ("text to image", "image to text", "image to image")
                ]
            },
        ),
        "grounding": Result(
            "grounding",
            [score("pointing", seed, 0.1, 0.1)],
            {},
            {"examples": [{"place": 3, "label": "edema", "view": "lateral", "boxes": [BOX], "map": "m"}]},
            {"m": random.random((2, 14, 14), np.float32)},
        ),
        "odd": Result(
            "odd",
            [score("error", seed, 0.4, 0.6, lower_is_better=True)],
            {},
            {"unknown": [1, {"deep": [ATTACK, None, {"x": 0.25}]}], "by_name": {"a": {"b": 1}, "c": {"b": 2}}, "n": 3},
        ),
    }  # fmt: skip
    about = {
        "run": run.name, "method": "clinvla", "versions": {"torch": "2.11"}, "device": "cpu", "seconds": 1.5,
        "encoding": {"batch_size": 4, "seconds_per_study": 0.0125, "peak_memory_bytes": 123456789},
        "data": {"source": "csv", "split": split, "studies": STUDIES, "root": str(data), "manifest_sha256":
                 hashlib.sha256((data / "manifest.json").read_bytes()).hexdigest()},
    }  # fmt: skip
    for task in tasks:
        write_result(found[task], run, about)
    summary = {"params": {"total": 1000, "trainable": 125}, "flops_per_sample": 2_000_000, "seconds": 61.5}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "run.json").write_text(json.dumps({"settings": {"seed": seed, "recipe": {"width": 64}}}))
    lines = [{"stage": "align", "step": step, "global": 5 / step, "local": 4 / step} for step in range(1, 9)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.fixture(scope="module")
def pages(tmp_path_factory, data):
    """The reports of one run and of three, of which two are compared in all."""
    folder = tmp_path_factory.mktemp("reports")
    first, second = (evaluated(folder / name, data, seed) for seed, name in enumerate(("first", "second")))
    third = evaluated(folder / "third", data, 2, tasks=("odd",))
    write_report([first], folder / "one.html")
    write_report([first, second, third], folder / "several.html")
    return {name: folder / f"{name}.html" for name in ("one", "several")}


class Page(HTMLParser):
    """Every tag with its attributes, every text, and what was left open."""

    VOID = ("meta", "img", "source", "line", "circle", "path", "polyline")

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def words(self):
        return " ".join(" ".join(self.texts).split())


@pytest.mark.parametrize("name", ["one", "several"])
def test_page_is_whole_alone_and_accessible(pages, name):
    text = pages[name].read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open and text.count("<h1>") == 1 and page.of("html")[0]["lang"] == "en"
    addresses = [value for _, a in page.tags for key, value in a.items() if key in ("src", "srcset", "href")]
    assert all(re.match(r"data:image/(jpeg|svg\+xml);base64,|#", address) for address in addresses)
    assert not re.search(r"url\(|@import|https?://", text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not any(key.startswith("on") for _, a in page.tags for key in a)
    assert all(a.get("alt") for a in page.of("img")) and all(a.get("scope") for a in page.of("th"))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(set(ids)) == len(ids) and {a["href"][1:] for a in page.of("a")} <= set(ids)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_texts_of_the_data_are_shown_not_obeyed(pages):
    text = pages["one"].read_text(encoding="utf-8")
    assert ATTACK not in text and "<b>nodule" not in text and "<b>score" not in text
    words = Page(text).words
    assert ATTACK in words and "<b>nodule</b>" in words and "a <b>score</b>" in words and "Report of number 3." in words


def test_no_identifier_of_a_patient(pages):
    for path in (*pages.values(), *(page.with_suffix(".json") for page in pages.values())):
        assert "secret" not in path.read_text(encoding="utf-8")
    assert "study 3" in Page(pages["one"].read_text(encoding="utf-8")).words


def test_every_figure_of_the_page_is_in_the_json(pages):
    page, figures = (
        Page(pages["one"].read_text(encoding="utf-8")),
        json.loads(pages["one"].with_suffix(".json").read_text()),
    )
    for task in figures["tasks"].values():
        for one in task["scores"]:
            found = one["runs"]["first"]
            assert found["low"] < found["value"] < found["high"]
            assert f"{found['value']:.3f} {found['low']:.3f} to {found['high']:.3f}" in page.words
            assert f"n = {found['rows']}, {found['patients']} patients" in page.words
    assert [one["score"] for one in figures["headline"]] == ["text to image, precision@5", "pointing", "error"]
    beyond = {
        one["name"]: one["runs"]["first"]["beyond_chance"] for t in figures["tasks"].values() for one in t["scores"]
    }
    assert beyond == {"text to image, precision@5": True, "a <b>score</b>": None, "pointing": None, "error": True}
    cost = figures["runs"]["first"]["cost"]
    assert cost["trained share"] == 0.125 and cost["encoding, seconds a study"] == 0.0125
    for shown in ("0.125", "2,000,000", "0.013", "123,456,789", "recipe.width 64", "torch 2.11"):
        assert shown in page.words


def test_numbers_do_not_change_from_one_writing_to_the_next(pages, data, tmp_path):
    write_report([evaluated(tmp_path / "first", data)], tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == pages["one"].read_bytes()


def test_pictures(pages):
    """Films of the studies, a map over each view with the box in its own, curves for light and dark."""
    page = Page(pages["one"].read_text(encoding="utf-8"))
    films = {}
    for image in page.of("img"):
        kind, _, content = image["src"].partition(";base64,")
        if kind == "data:image/jpeg":
            films[image["alt"]] = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))), int)
    labels = "edema, <b>nodule</b>"
    assert films[f"frontal view of study 3, {labels}"].shape[:2] == (96, 80)
    frontal, lateral = (
        films[f"{view} view of study 3, {labels}, under a map of edema{outlined}"]
        for view, outlined in (("frontal", ""), ("lateral", ", outlined"))
    )
    assert frontal.shape == lateral.shape == (224, 187, 3)
    outlined = [image[48:130, 19, 2].mean() - image[48:130, 19, 0].mean() for image in (frontal, lateral)]
    assert outlined[1] > 100 > outlined[0]  # the left side of the box, in cyan
    curves = [a for a in page.of("img") if "curves" in a["alt"]]
    assert [a["alt"] for a in curves] == ["first, alignment: losses: curves by step"]
    (dark,) = page.of("source")
    assert dark["media"] == "(prefers-color-scheme: dark)" and dark["srcset"] != curves[0]["src"]


def test_several_runs_are_compared_by_pairs(pages):
    figures = json.loads(pages["several"].with_suffix(".json").read_text())
    precision, other = figures["tasks"]["retrieval"]["scores"]
    first, second = (precision["runs"][name] for name in ("first", "second"))
    gain = second["difference"]
    assert first["difference"] is None and gain["to"] == "first" and gain["better"] is True
    assert gain["value"] == pytest.approx(second["value"] - first["value"]) and 0 < gain["low"] < gain["high"]
    assert other["runs"]["second"]["difference"]["better"] is None  # the same mean, drawn twice
    # On the 200 pairs themselves: 1.96 standard errors of differences of 100 patients.
    assert gain["high"] - gain["low"] == pytest.approx(2 * 1.96 * 0.1 * 2**0.5 / 200**0.5, rel=0.25)
    assert list(figures["tasks"]["odd"]["scores"][0]["runs"]) == ["first", "second", "third"]
    words = Page(pages["several"].read_text(encoding="utf-8")).words
    assert "▲ better than first" in words and "≈ interval holds zero" in words and "not evaluated" in words
    assert "Settings of training, those that differ first first second third seed 0 1 2 recipe.width" in words


def test_an_error_that_falls_is_better(data, tmp_path):
    runs = [evaluated(tmp_path / name, data, 0, tasks=("odd",)) for name in "ab"]
    result = Result("odd", [score("error", 0, 0.3, 0.6, lower_is_better=True)])
    write_result(result, runs[1], read_result(runs[1], "odd").about)
    write_report(runs, tmp_path / "out.html")
    (found,) = json.loads((tmp_path / "out.json").read_text())["tasks"]["odd"]["scores"]
    difference = found["runs"]["b"]["difference"]
    assert difference["value"] == pytest.approx(-0.1) and difference["better"] is True


def test_several_data_sets(data, tmp_path):
    """One section each, and runs are compared on what they share."""
    run, other = (evaluated(tmp_path / name, data, tasks=("odd",)) for name in "ab")
    evaluated(run, data, split="validate", tasks=("odd",))
    write_report([run, other], tmp_path / "out.html")
    tasks = json.loads((tmp_path / "out.json").read_text())["tasks"]
    assert [list(of["scores"][0]["runs"]) for of in tasks.values()] == [["a", "b"], ["a"]]
    words = Page((tmp_path / "out.html").read_text(encoding="utf-8")).words
    assert all(title.startswith("odd, ") and title.split(", ")[1] in words for title in tasks)


def test_results_of_two_models_are_not_mixed(data, tmp_path):
    run = evaluated(tmp_path / "run", data, tasks=("odd",))
    about = read_result(run, "odd").about
    write_result(Result("collapse", [score("variance", 0)]), run, about | {"model_sha256": "another"})
    with pytest.raises(DataError, match=r"evaluated as different models .*collapse, .*odd.*trained again"):
        write_report([run], tmp_path / "out.html")


def test_data_that_are_gone(data, tmp_path):
    moved = shutil.copytree(data, tmp_path / "moved")
    run = evaluated(tmp_path / "run", moved)
    shutil.rmtree(moved)
    write_report([run], tmp_path / "out.html")
    words = Page((tmp_path / "out.html").read_text(encoding="utf-8")).words
    assert "Films and reports are left out of grounding, retrieval" in words and "no longer there" in words
    assert "✓ right" in words and "study 3" in words and "Report of number" not in words


def test_refused(data, tmp_path, pages):
    run = evaluated(tmp_path / "run", data)
    other = evaluated(tmp_path / "other", data, split="validate")
    (tmp_path / "bare").mkdir()
    for runs, out, message in [
        ([run], "out.pdf", r"ends in \.html"),
        ([], "out.html", "expected the folder of an evaluated run"),
        ([run, run], "out.html", "named twice"),
        ([tmp_path / "none"], "out.html", "none: no such folder"),
        ([run, tmp_path / "bare"], "out.html", "bare was not evaluated.*python -m training.evaluate"),
        (
            [run, other],
            "out.html",
            "other and run were evaluated on different data, .*csv-validate-.* and csv-test-",
        ),
    ]:
        with pytest.raises(DataError, match=message):
            write_report(runs, tmp_path / out)
    assert not list(tmp_path.glob("out*"))


# What a person sees


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if not found:
        pytest.skip("needs a Chromium: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, pages):
    """Open a report; what it asked the network for and complained about comes with it."""
    contexts = []

    def look(name, width=1280, scheme="light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        page, asked, complaints = contexts[-1].new_page(), [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(pages[name].as_uri())
        page.evaluate("Promise.all([...document.images].map(image => image.decode()))")
        return page, asked, complaints

    yield look
    for context in contexts:
        context.close()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["one", "several"])
def test_what_a_person_sees(opened, pages, name, width):
    page, asked, complaints = opened(name, width)
    figures = json.loads(pages[name].with_suffix(".json").read_text())
    title = "Evaluation of first" if name == "one" else "Evaluation of first, second, third"
    assert page.title() == page.locator("h1").inner_text() == title
    for heading in ("At a glance", "Retrieval", "Grounding", "Odd", "Training", "Cost", "Data", "Settings", "Versions"):
        assert page.get_by_role("heading", name=heading, exact=True).is_visible()
    glance = page.get_by_role("region", name="The most telling scores")
    for one in figures["headline"]:
        row = glance.get_by_role("row").filter(has=page.get_by_role("rowheader", name=one["score"]))
        (of,) = (s for s in figures["tasks"][one["task"]]["scores"] if s["name"] == one["score"])
        for found in of["runs"].values():
            shown = row.get_by_text(f"{found['value']:.3f}", exact=True).first
            assert (
                shown.is_visible() and row.get_by_text(f"{found['low']:.3f} to {found['high']:.3f}").first.is_visible()
            )
        dots = row.locator("svg .dot")
        assert dots.count() >= len(of["runs"]) and dots.first.is_visible()
    for mark in ("✓ right", "✗ wrong"):
        assert page.get_by_text(mark).first.is_visible()
    borders = [
        page.locator(f".hits .{c}").first.evaluate("e => getComputedStyle(e).borderStyle") for c in ("right", "wrong")
    ]
    assert borders == ["solid", "dashed"]
    for details in page.locator("details").all():
        details.evaluate("e => { e.open = true; }")
    broken = "[...document.images].filter(i => !i.naturalWidth || !i.getBoundingClientRect().width).length"
    assert page.evaluate("document.images.length") > 10 and page.evaluate(broken) == 0
    # Nothing hangs over the side but what scrolls in its own box.
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    free = "[...document.querySelectorAll('main *')].filter(e => !e.closest('.wide'))"
    assert page.evaluate(f"Math.max(...{free}.map(e => e.getBoundingClientRect().right)) <= innerWidth + 1")
    assert [url for url in asked if not url.startswith("data:")] == [pages[name].as_uri()] and complaints == []
    assert page.title() == title  # no script of a report has run


CONTRASTS = """() => {
  const channels = text => text.match(/[\\d.]+/g).map(Number);
  const linear = x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = e => { const c = channels(getComputedStyle(e).backgroundColor);
    return c.length == 4 && c[3] == 0 ? (e.parentElement ? behind(e.parentElement) : [255, 255, 255]) : c; };
  const texts = [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().width &&
    [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim()));
  return texts.map(e => { const [a, b] = [channels(getComputedStyle(e).color), behind(e)].map(luminance);
    return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.outerHTML.slice(0, 80)]; });
}"""


def test_light_and_dark(opened):
    seen = {}
    for scheme in ("light", "dark"):
        page, *_ = opened("several", scheme=scheme)
        contrasts = page.evaluate(CONTRASTS)
        assert len(contrasts) > 100 and min(contrasts)[0] >= 4.5, min(contrasts)
        colours = "e => [getComputedStyle(e).color, getComputedStyle(e).backgroundColor]"
        curve = page.locator("picture img").first.evaluate("e => e.currentSrc")
        seen[scheme] = (*page.locator("body").evaluate(colours), curve)
    assert all(light != dark for light, dark in zip(*seen.values(), strict=True))


def test_the_headline_is_of_the_largest_share_of_labels(tmp_path, data):
    run = evaluated(tmp_path / "run", data, 0)
    rows = {"value": np.arange(24.0)}, np.arange(24), np.arange(24)
    names = {
        "segmentation": ("Dice of edema", "Dice of edema where it is shown"),
        "linear-probe": ("macro AUC", "AUC edema"),
    }
    about = read_result(run, "odd").about
    for memory, (task, of) in enumerate(names.items()):
        scores = [Score(f"{share}% of labels, {name}", "mean", *rows) for share in (1, 10, 100) for name in of]
        encoding = about["encoding"] | {"peak_memory_bytes": 10**9 + memory}
        write_result(Result(task, scores), run, about | {"encoding": encoding})
    write_report([run], tmp_path / "report.html")
    figures = json.loads((tmp_path / "report.json").read_text())
    headline = [one["score"] for one in figures["headline"] if one["task"] in names]
    assert headline == ["100% of labels, macro AUC", *(f"100% of labels, {name}" for name in names["segmentation"])]
    assert figures["runs"]["run"]["cost"]["most memory while evaluating, bytes"] == 10**9 + 1
