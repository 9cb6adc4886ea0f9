"""The main job on real input: a real chest film in several formats, and real report texts, from a table of paths."""

import csv
import json
import tarfile
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from clinvla_fast import ClinVLA
from clinvla_fast.data.radiographs import read_radiograph
from training.prepare import main as prepare
from training.pretrain import main as pretrain


def real_reports(count: int) -> list[str]:
    """Findings and impressions of the Indiana University collection, read where torchxrayvision installed them."""
    package = find_spec("torchxrayvision")
    if package is None:
        pytest.skip("needs torchxrayvision, which carries real report texts")
    reports = []
    with tarfile.open(Path(package.origin).parent / "data" / "NLMCXR_reports.tgz") as archive:
        for member in archive:
            if member.name.endswith(".xml") and len(reports) < count:
                parts = ElementTree.parse(archive.extractfile(member)).iter("AbstractText")
                text = {part.get("Label"): part.text or "" for part in parts}
                if text.get("FINDINGS") and text.get("IMPRESSION"):
                    reports.append(f"FINDINGS: {text['FINDINGS']} IMPRESSION: {text['IMPRESSION']}")
    return reports


def test_from_a_table_to_a_model(tmp_path):
    data = pytest.importorskip("pydicom.data", reason="needs pydicom-data, which carries a real chest film")
    films = [data.get_testdata_file(f"RG1_{kind}.dcm", download=False) for kind in ("J2KR", "UNCI", "J2KI")]
    if None in films:
        pytest.skip("needs pydicom-data, which carries a real chest film")
    png = tmp_path / "film.png"
    Image.fromarray(read_radiograph(films[0], 300)).save(png)
    with (tmp_path / "studies.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["study_id", "patient_id", "frontal", "lateral", "report", "split"])
        for i, report in enumerate(real_reports(30)):
            images = [*films, png.name, "missing.png"]
            lateral = images[(i + 1) % 4] if i % 3 else ""
            table.writerow([f"s{i}", f"p{i}", images[i % 5], lateral, report, "test" if i % 5 == 3 else "train"])
    prepare(["csv", str(tmp_path / "studies.csv"), "--out", str(tmp_path / "data")])
    counts = json.loads((tmp_path / "data" / "manifest.json").read_text())["counts"]
    assert counts["kept"] + sum(counts["dropped"].values()) == 30
    assert set(counts["dropped"]) == {"file is missing"} and counts["splits"]["test"] == 6

    sizes = [
        "--batch-size",
        "8",
        "--epochs",
        "1",
        "--towers.epochs",
        "1",
        "--towers.batch-size",
        "8",
        "--device",
        "cpu",
    ]
    pretrain([*sizes, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")])
    retrieval = json.loads((tmp_path / "run" / "summary.json").read_text())["retrieval"]
    assert retrieval["text_to_image"]["recall@10_chance"] == 1  # 6 held-out studies
    assert retrieval["text_to_image"]["precision@5"] is None  # the table has no labels
    model = ClinVLA.from_pretrained(tmp_path / "run")
    embedded = model.encode_images([{"frontal": films[0]}, {"frontal": png, "lateral": films[1]}])
    assert embedded.isfinite().all() and embedded.shape == (2, model.recipe.width)
