import importlib.util
import re
import tarfile
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinvla_fast.data.reports import Steps, clean_report, split_sentences, truncate_sentences

MIMIC_LIKE = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___F with cough  // r/o PNA

 COMPARISON:  Chest radiograph from ___.

 FINDINGS:

 The ETT tip is 2.5 cm above the carina.  Lungs: Clear.  There is no
 pleural effusion or PTX.

 IMPRESSION:

 1. Possible RLL atelectasis.
 2. Dr. ___ was told
 - No CHF

 NOTIFICATION:  By phone to ___.
"""


def test_a_whole_report():
    assert clean_report(MIMIC_LIKE) == (
        "The endotracheal tube tip is 2.5 cm above the carina. Lungs: Clear. There is no pleural effusion or "
        "pneumothorax. Right lower lobe atelectasis. Dr. was told. No congestive heart failure"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Findings: Clear lungs.\nImpression: Normal.", "Clear lungs. Normal."),
        ("INDICATION: Cough.\nIMPRESSION\nNormal chest.", "Normal chest."),
        ("INDICATION Cough\nIMPRESSION Normal chest.\nTECHNIQUE Two views.", "Normal chest."),
        ("EXAM: Chest. FINDINGS: Clear lungs. IMPRESSION: Normal. RECOMMENDATION: None.", "Clear lungs. Normal."),
        ("History: Cough.\nConclusion: Normal chest.", "Normal chest."),
        ("DIAGNOSIS: Edema.\nADDENDUM: Also effusion.", "Edema. Also effusion."),
        ("FINDINGS AND IMPRESSION: Normal chest.", "Normal chest."),
        ("Findings are consistent with edema.", "Findings are consistent with edema."),
        ("INDICATION: Cough.\n\nThe lungs are clear.\n\nThe heart is large.", "The heart is large."),
        ("FINAL REPORT\n\nThe lungs are clear.", "The lungs are clear."),
        ("The lungs are clear.\n\nThe heart is large.", "The lungs are clear. The heart is large."),
        ("INDICATION: Cough.", ""),
        ("FINDINGS: Edema.\nIMPRESSION: See above.", "Edema."),
    ],
)
def test_sections(text, expected):
    assert clean_report(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", " \n", "NO IMPRESSION", "No impression.", "none", "N/A", "nan", "FINDINGS:\nIMPRESSION:\n", "XXXX.", "___"],
)
def test_nothing_to_learn_from(text):
    assert clean_report(text) == ""


@pytest.mark.parametrize("text", ["No acute findings.", "No effusion.", "Normal.", "None of the lines has moved."])
def test_short_reports_stay(text):
    assert clean_report(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The XXXX are XXXX, no edema XXXX.", "The are, no edema."),
        ("A [**Hospital 1**] film of [**2010-1-1**].", "A film of."),
        ("A ___-year-old with a chest x-XXXX.", "A with a chest."),
        ("Scarring/XXXX and XXXX/granulomas.", "Scarring and granulomas."),
    ],
)
def test_identification_marks(text, expected):
    assert clean_report(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Opacity may represent pneumonia.", "Opacity represents pneumonia."),
        ("Opacities could represent pneumonia.", "Opacities represent pneumonia."),
        ("Atelectasis may be due to pain.", "Atelectasis is due to pain."),
        ("Pneumonia cannot be excluded.", "Pneumonia."),
        ("Possible small effusion, likely chronic.", "Small effusion, chronic."),
        ("It is possible that this is edema.", "This is edema."),
        ("No definite pneumothorax.", "No pneumothorax."),
        # What would flip or break the sentence stays.
        ("Pneumonia is unlikely.", "Pneumonia is unlikely."),
        ("Pneumonia is less likely than edema.", "Pneumonia is less likely than edema."),
        ("Edema is not likely chronic.", "Edema is not likely chronic."),
        ("The line may not be in the vein.", "The line may not be in the vein."),
        ("Pneumothorax has been excluded.", "Pneumothorax has been excluded."),
        ("CT could be performed.", "Computed tomography could be performed."),
        ("Repeat as soon as possible.", "Repeat as soon as possible."),
        ("There is no likely fracture.", "There is no fracture."),
    ],
)
def test_hedges(text, expected):
    assert clean_report(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Small PTX, ILD and PICC line.",
            "Small pneumothorax, interstitial lung disease and peripherally inserted central catheter.",
        ),
        (
            "Two ETTs w/o effusion, s/p CABG.",
            "Two endotracheal tubes without effusion, status post coronary artery bypass graft.",
        ),
        ("A pe of tb shape lll.", "A pe of tb shape lll."),
        ("RUL/RML opacity.", "Right upper lobe/right middle lobe opacity."),
        ("b/l effusions w/ edema", "Bilateral effusions with edema"),
        ("NG tube and ngt end in the stomach.", "Nasogastric tube and nasogastric tube end in the stomach."),
    ],
)
def test_abbreviations(text, expected):
    assert clean_report(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A 2cm x 3cm mass.", "A 6 cm² mass."),
        ("A 2.5 x 4 mm nodule.", "A 10 mm² nodule."),
        ("A 1 x 2 x 3 cm mass.", "A 6 cm³ mass."),
        ("A 20 mm by 3 cm mass.", "A 6 cm² mass."),
        ("A 2 x 3 grid, 2.5 cm.", "A 2 x 3 grid, 2.5 cm."),
    ],
)
def test_measurements_are_an_option(text, expected):
    assert clean_report(text, Steps(measurements=True)) == expected
    assert clean_report(text) == text


def test_sentences():
    text = "A 2.5 cm nodule. Seen by Dr. Who vs. the prior. 1. No edema! T12. Stable?"
    assert split_sentences(text) == [
        "A 2.5 cm nodule.",
        "Seen by Dr. Who vs. the prior.",
        "1. No edema!",
        "T12.",
        "Stable?",
    ]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (9, "One two three. Four five. Six."),
        (5, "One two three. Four five."),
        (4, "One two three."),
        (2, "One two"),
        (0, ""),
    ],
)
def test_truncation_keeps_whole_sentences(limit, expected):
    assert truncate_sentences("One two three. Four five. Six.", lambda text: len(text.split()), limit) == expected


@settings(deadline=None, max_examples=300)
@given(
    st.text(max_size=60)
    | st.lists(
        st.sampled_from(
            [
                "FINDINGS:",
                "impression",
                "Technique:",
                "\n",
                "\n\n",
                "1. ",
                "- ",
                "XXXX",
                "___",
                "may represent",
                "likely",
                "is",
                "cannot be excluded",
                "PTX",
                "no",
                "edema",
                ".",
                ",",
                "w/",
                "2cm x 3cm",
                "REPORT",
                "Dr.",
                "(",
                ")",
                "/",
                "*",
                "possibly",
            ]
        ),
        max_size=14,
    ).map(" ".join)
)
def test_cleaning_twice_changes_nothing(text):
    once = clean_report(text)
    assert clean_report(once) == once


@pytest.fixture(scope="module")
def open_i():
    """(findings and impression, whole report) of the 3,955 real reports, read in place."""
    spec = importlib.util.find_spec("torchxrayvision")
    if not spec:
        pytest.skip("needs torchxrayvision")
    reports = []
    with tarfile.open(Path(spec.origin).parent / "data" / "NLMCXR_reports.tgz") as archive:
        for member in archive:
            if member.name.endswith(".xml"):
                parts = ElementTree.parse(archive.extractfile(member)).getroot().iter("AbstractText")
                texts = {part.get("Label"): part.text or "" for part in parts}
                whole = "\n".join(f"{label}: {text}" for label, text in texts.items())
                reports.append((f"{texts['FINDINGS']} {texts['IMPRESSION']}", whole))
    return reports


def test_real_reports(open_i):
    assert len(open_i) == 3955
    cleaned = [(wanted, clean_report(whole)) for wanted, whole in open_i]
    assert all(bool(wanted.strip()) == bool(clean) for wanted, clean in cleaned)
    for _, clean in cleaned:
        assert "XXX" not in clean and "\n" not in clean and "  " not in clean
        assert not re.search(r"\b(?:INDICATION|COMPARISON):|\b(?:PTX|CHF|COPD)\b", clean)
        assert clean_report(clean) == clean


def test_real_negations_stay(open_i):
    # "is not excluded" is the one hedge that holds a negation.
    hedge = re.compile(r"\b(?:is|are) not (?:\w+ly )?excluded", re.I)
    negation = re.compile(r"\b(?:no|not|without|negative|free|never|none|absent|unlikely|neither|nor)\b", re.I)
    for wanted, whole in open_i:
        before = negation.findall(hedge.sub("", re.sub(r"XXXX'\w+", "", wanted)))
        after = negation.findall(hedge.sub("", clean_report(whole)))
        assert [w.lower() for w in before] == [w.lower() for w in after], wanted


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("IMPRESSION:\n\n No acute process.\n\n RECOMMENDATION(S):  Repeat in 6 weeks.", "No acute process."),
        ("NOTIFICATION(S): called Dr. A.\nFINDING(S): Edema.", "Edema."),
        ("INDICATION: cough.\n\nLungs are clear.\n\nDictated by Dr. Smith", "Lungs are clear."),
        ("FINDINGS: Clear.\nElectronically signed and reviewed by Dr. X", "Clear."),
        ("The film was reviewed by two readers. Clear.", "The film was reviewed by two readers. Clear."),
        ("No PNA. Discussed with PCP Dr. A.", "No pneumonia. Discussed with PCP Dr. A."),
        ("ICD-10 R91. Small L PE.", "ICD-10 R91. Small L PE."),
    ],
)
def test_headings_sign_offs_and_ambiguous_abbreviations(text, expected):
    assert clean_report(text) == expected


@pytest.mark.parametrize("step", ["sections", "marks", "formatting", "hedges", "abbreviations"])
def test_each_step_can_be_left_out(step):
    text = "INDICATION: cough.\nFINDINGS:\n1. Possible CHF at ___.\n2. Clear."
    assert clean_report(text) == "CHF at. Clear.".replace("CHF", "Congestive heart failure")
    kept = {
        "sections": "cough",
        "marks": "___",
        "formatting": "1.",
        "hedges": "Possible",
        "abbreviations": "CHF",
    }
    assert kept[step] in clean_report(text, Steps(**{step: False}))
