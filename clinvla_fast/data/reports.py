"""Report text as the text tower should see it: findings and impression, plain sentences, standard terms."""

import re
from collections.abc import Callable
from dataclasses import dataclass

_S = r"(?:s|\(s\))?"  # one or several
_KEPT = rf"finding{_S}|impression{_S}|conclusions?|diagnos[ie]s|opinion|addend(?:um|a)"
_OTHER = (
    r"exam(?:ination)?s?(?: type)?|study|procedure|techniques?|views?"
    rf"|comparison{_S}|recommendation{_S}|notification{_S}"
    r"|(?:clinical |patient |medical |relevant )?(?:history|information|indications?|data|statement|details)"
    r"|reason for (?:the )?(?:exam(?:ination)?|study|test)"
    r"|(?:electronically )?signed(?: by)?|dictated(?: by)?|attending|end of impression|summary|accession(?: number)?"
)
_TITLE = r"(?:final|preliminary|radiology|provisional) (?:report|read)|wet read|report|narrative"
_PREFIX = r"(?:final |radiographic |radiological |chest |x-?ray |overall )?"
_SUFFIX = rf"(?:\s*(?:and|&|/)\s*(?:findings?|impressions?|conclusions?|recommendation{_S})| ?#?\d+)?"
_NAME = rf"(?:(?P<kept>{_PREFIX}(?:{_KEPT}){_SUFFIX})|(?P<other>{_OTHER})|(?P<title>{_TITLE}))"
# A heading stands at the start of a line and has a colon or the line to itself. Upper case alone also marks one: with
# a colon anywhere (tables hold whole reports in one line), without a colon at the start of a line.
_HEADINGS = [
    re.compile(rf"^[ \t]*[*#_]*{_NAME}[*_]*[ \t]*(?::[*_]*|$)", re.I | re.M),
    re.compile(rf"(?<=[.!?])\s+(?P<kept>{_PREFIX}(?:{_KEPT}){_SUFFIX}):(?P<other>)(?P<title>)", re.I),
    re.compile(rf"\b{_NAME}\s*:", re.I),
    re.compile(rf"^[ \t]*{_NAME}(?:[ \t]{{2,}}|[ \t]+(?=(?-i:[A-Z][a-z]|\d)))", re.I | re.M),
]
# A sign-off needs no colon: what follows it is a name.
_SIGNED = r"(?:electronically )?(?:signed|dictated|reviewed|approved|interpreted)(?:(?:,| and|&)? \w+ed)* by"
_HEADINGS.append(re.compile(rf"^[ \t]*(?P<other>{_SIGNED})\b(?P<kept>)(?P<title>)", re.I | re.M))
_UPPER_ONLY = (False, False, True, True, False)

_NOTHING = re.compile(
    r"(?:no|none|nil|n/?a|nan|null|as|see|not)"
    r"(?: (?:impressions?|findings?|diagnos[ie]s|conclusions?|reports?|addend(?:um|a)))?"
    r"(?: (?:available|given|provided|dictated|above|below))*[\s.]*|\W*",
    re.I,
)
_ABBREVIATED = re.compile(r"(?:^|\W)(?:dr|mr|mrs|ms|vs|no|fig|approx|e\.g|i\.e|a\.m|p\.m|st|^\(?\d{1,2})\.$", re.I)

# Devices and anatomy are named as in RadLex, signs and diseases as in the Fleischner Society's glossary; PTX and ILD
# are the two that the ClinVLA paper prints. Abbreviations with two common meanings in a report (PA, RA, MR; PE:
# embolism or effusion; PCP: pneumonia or physician) stay.
# Matched exactly as written: in lower case many of them are ordinary words or parts of them.
ABBREVIATIONS = {
    # diseases and signs
    "PTX": "pneumothorax",
    "PNA": "pneumonia",
    "CHF": "congestive heart failure",
    "ILD": "interstitial lung disease",
    "IPF": "idiopathic pulmonary fibrosis",
    "COPD": "chronic obstructive pulmonary disease",
    "ARDS": "acute respiratory distress syndrome",
    "TB": "tuberculosis",
    "DISH": "diffuse idiopathic skeletal hyperostosis",
    "GGO": "ground-glass opacity",
    # lobes and places
    "RUL": "right upper lobe",
    "RML": "right middle lobe",
    "RLL": "right lower lobe",
    "LUL": "left upper lobe",
    "LLL": "left lower lobe",
    "SVC": "superior vena cava",
    "IVC": "inferior vena cava",
    "IJ": "internal jugular",
    "GE": "gastroesophageal",
    "LV": "left ventricle",
    # devices and operations
    "ETT": "endotracheal tube",
    "ET tube": "endotracheal tube",
    "NGT": "nasogastric tube",
    "NG tube": "nasogastric tube",
    "OGT": "orogastric tube",
    "OG tube": "orogastric tube",
    "PICC line": "peripherally inserted central catheter",
    "PICC": "peripherally inserted central catheter",
    "CVL": "central venous line",
    "CVC": "central venous catheter",
    "IABP": "intra-aortic balloon pump",
    "AICD": "implantable cardioverter-defibrillator",
    "ICD": "implantable cardioverter-defibrillator",
    "CABG": "coronary artery bypass graft",
    "ECMO": "extracorporeal membrane oxygenation",
    # examinations
    "CXR": "chest radiograph",
    "CT": "computed tomography",
    "CTA": "computed tomography angiography",
    "MRI": "magnetic resonance imaging",
}
# In either case: no ordinary word is spelt so.
_ANY_CASE = {
    "ptx": "pneumothorax",
    "chf": "congestive heart failure",
    "copd": "chronic obstructive pulmonary disease",
    "ett": "endotracheal tube",
    "ngt": "nasogastric tube",
    "picc": "peripherally inserted central catheter",
    "cxr": "chest radiograph",
    "b/l": "bilateral",
    "c/w": "consistent with",
    "s/p": "status post",
    "r/o": "rule out",
    "w/o": "without",
    "w/": "with",
}


def _longest_first(table: dict[str, str]) -> str:
    return "|".join(re.escape(key) for key in sorted(table, key=len, reverse=True))


_ABBREVIATION = re.compile(rf"\b(?:{_longest_first(ABBREVIATIONS)})(?=s?\b)(?!-\d)")  # ICD-10 is a code
_ABBREVIATION_ANY_CASE = re.compile(rf"\b(?:{_longest_first(_ANY_CASE)})(?:(?<=/)(?!\w\b)|(?=s?\b)(?<!/))", re.I)

_EXCLUDED = r"(?:\w+ly )?(?:excluded|ruled out)\b"
_DOUBT = r"possibl[ey]|probabl[ey]|perhaps|presumably|questionabl[ey]"
_HEDGES = [
    (re.compile(pattern, re.I), replacement)
    for pattern, replacement in [
        (rf"\s*\b(?:can ?not|can't|could not) be {_EXCLUDED}", ""),
        (rf"\s*\b(?:is|are) not {_EXCLUDED}", ""),
        (r"\b(?:can ?not|can't|could not) (?:\w+ly )?(?:exclude|rule out) ", ""),
        (r"\bit is (?:possible|likely|probable) that ", ""),
        (r"\s*\b(?:is|are) (?:also )?(?:possible|likely|probable|questionable)(?=\s*(?:[.;]|$))", ""),
        (r"\b(is|are) likely to be\b", r"\1"),
        (r"(?<!not )(?<!less )(?<!more )(?<!as )\b(?:(?:most|very|highly) )?likely (?=\w)(?!to\b|than\b)", ""),
        (rf"(?<!not )(?<!as )\b(?:{_DOUBT}) (?=\w)(?!to\b|that\b)", ""),
        (r"(?<=\bno )definite (?=\w)|(?<=\bwithout )definite (?=\w)", ""),
    ]
]
_MODAL = re.compile(
    r"(\w+) (?:may|might|could) (?:(represent|reflect|indicate|suggest)"
    r"|be (?=(?:due|related|secondary|attributable|compatible|consistent|an?|the|artifact(?:ual)?|present)\b))\b",
    re.I,
)


@dataclass(frozen=True)
class Steps:
    """Which steps `clean_report` takes, in this order; each is a function of this module."""

    sections: bool = True
    """Only findings, impression, conclusion, diagnosis and addenda; without such headings, the last paragraph."""
    marks: bool = True
    """No de-identification marks."""
    formatting: bool = True
    """No list numbers, bullets and emphasis."""
    hedges: bool = True
    """No "possibly", no "cannot be excluded"."""
    abbreviations: bool = True
    """Standard terms for abbreviations."""
    measurements: bool = False
    """"2cm x 3cm" becomes "6 cm²"."""


def clean_report(text: str, steps: Steps = Steps()) -> str:
    """The findings and impression of a report in one line of plain sentences; "" if there is nothing to learn from.

    Without a Findings, Impression, Conclusion or Diagnosis heading, the last paragraph is taken, or the whole text
    where it has no headings at all. Cleaning twice changes nothing.
    """
    while True:
        cleaned = _clean_once(text, steps)
        if cleaned == text:
            return cleaned
        text = cleaned


def _clean_once(text: str, steps: Steps) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if steps.sections:
        text = keep_sections(text)
    if steps.marks:
        text = drop_marks(text)
    if steps.formatting:
        text = drop_formatting(text)
    text = tidy(text)
    if steps.hedges:
        text = drop_hedges(text)
    if steps.abbreviations:
        text = expand_abbreviations(text)
    if steps.measurements:
        text = multiply_measurements(text)
    text = " ".join(s[0].upper() + s[1:] for s in split_sentences(tidy(text)))
    return "" if _NOTHING.fullmatch(text) else text


def _sections(text: str) -> list[tuple[str, str]]:
    """(kind, body) in order; kind is kept, other or title, and title also for what precedes the first heading."""
    found = {}
    for pattern, upper_only in zip(_HEADINGS, _UPPER_ONLY, strict=True):
        for match in pattern.finditer(text):
            kind = next(kind for kind in ("kept", "other", "title") if match[kind])
            if not upper_only or match[kind].isupper():
                found.setdefault(match.start(kind), (kind, match))
    starts = [("title", 0)] + [(kind, match.end()) for _, (kind, match) in sorted(found.items())]
    ends = [match.start() for _, (_, match) in sorted(found.items())] + [len(text)]
    return [(kind, text[start:end].strip()) for (kind, start), end in zip(starts, ends, strict=True)]


def keep_sections(text: str) -> str:
    """Findings, impression, conclusion, diagnosis and addenda; else the last paragraph; else the text as it is."""
    sections = _sections(text)
    kept = [body for kind, body in sections if kind == "kept"]
    if kept:
        return "\n\n".join(body for body in kept if not _NOTHING.fullmatch(body))
    if all(kind == "title" for kind, _ in sections):
        return "\n\n".join(body for _, body in sections if body)
    paragraphs = []
    for kind, body in sections:
        # The first paragraph below "Indication:" is the indication, not the report.
        paragraphs += re.split(r"\n\s*\n", body)[kind == "other" :]
    return next((p for p in reversed(paragraphs) if p.strip()), "")


def drop_marks(text: str) -> str:
    """Without de-identification marks, and without what a hyphen ties to them ("___-year-old")."""
    mark = r"(?:_{2,}|\d*X{3,}\w*|\[\*\*.*?\*\*\])"
    return re.sub(rf"/?(?:\b\w+-)*{mark}(?:-\w+)*(?:'\w*)?/?", " ", text, flags=re.S)


def drop_formatting(text: str) -> str:
    """One line, without list numbers, bullets and emphasis; an item or paragraph that ends bare gets its full stop."""
    item = r"(?:[-*•]|\(?\d{1,2}[.)])[ \t]+"
    text = re.sub(rf"(?<=[\w)])[ \t]*\n(?:[ \t]*\n)*[ \t]*{item}|(?<=[\w)])[ \t]*\n[ \t]*\n\s*", ".\n", text)
    text = re.sub(rf"^[ \t]*(?:{item})+", "", text, flags=re.M)
    text = re.sub(r"(?<=[.;:?!])\s+(?:\d{1,2}[.)]\s+)+(?=[A-Za-z])", " ", text)
    return re.sub(r"[*•`#|]", " ", text)


def drop_hedges(text: str) -> str:
    """Without hedges ("possibly", "cannot be excluded"); "may represent" becomes "represents". Negations stay."""
    for pattern, replacement in _HEDGES:
        text = pattern.sub(replacement, text)
    return _MODAL.sub(_assert, text)


def _assert(match: re.Match) -> str:
    subject, verb = match.groups()
    # "opacities may represent" -> represent, but "atelectasis", "this", "mass" and "thymus" are singular
    plural = subject.lower().endswith("s") and not subject.lower().endswith(("is", "ss", "us"))
    if verb:
        return f"{subject} {verb.lower()}{'' if plural else 's'}"
    return f"{subject} {'are' if plural else 'is'} "


def expand_abbreviations(text: str) -> str:
    """With the standard term for every abbreviation of the tables above."""
    text = _ABBREVIATION.sub(lambda match: ABBREVIATIONS[match[0]], text)
    return _ABBREVIATION_ANY_CASE.sub(
        lambda match: _ANY_CASE[match[0].lower()] + (" " if match[0].endswith("/") else ""), text
    )


def multiply_measurements(text: str) -> str:
    """ "2cm x 3cm" as "6 cm²" and "1 x 2 x 3 mm" as "6 mm³", in the last unit."""
    number = r"(\d+(?:\.\d+)?)\s*(mm|cm)?"

    def product(match: re.Match) -> str:
        values, units = match.groups()[0::2], match.groups()[1::2]
        last = next(unit for unit in reversed(units) if unit)
        result = 1.0
        for value, unit in zip(values, units, strict=True):
            if value:
                result *= float(value) * {"mm": 1, "cm": 10}[unit or last] / {"mm": 1, "cm": 10}[last]
        return f"{round(result, 3):g} {last}{'³' if values[2] else '²'}"

    by = r"\s*(?:x|X|\N{MULTIPLICATION SIGN}|by)\s*"
    return re.sub(rf"\b{number}{by}{number}(?:{by}{number})?(?<=[cm]m)\b", product, text)


def tidy(text: str) -> str:
    """Single spaces, no space before punctuation, no doubled or leading punctuation, no empty brackets."""
    text = re.sub(r"\(\W*\)|\[\W*\]", " ", text)
    text = re.sub(r"(?<=[a-z])\.(?=[A-Z][a-z])", ". ", text)
    text = re.sub(r"\s+([.,;:!?)])(?!\d)", r"\1", re.sub(r"\s+", " ", text))
    text = re.sub(r"[,;:]\s*(?=[.,;:])", "", text)
    text = re.sub(r"([.?!])(?:\s*[.,;:](?!\d))+", r"\1", text)
    return re.sub(r"^[\s.,;:!?)\]/-]+(?!\d)|[\s,;:]+$", "", text)


def split_sentences(text: str) -> list[str]:
    """The sentences of `text`. Full stops in "2.5 cm", "Dr. A", "vs. B" and "1. C" end none."""
    sentences: list[str] = []
    for piece in re.split(r"(?<=[.!?])\s+", text.strip()):
        if sentences and _ABBREVIATED.search(sentences[-1]):
            sentences[-1] += " " + piece
        elif piece:
            sentences.append(piece)
    return sentences


def truncate_sentences(text: str, count_tokens: Callable[[str], int], limit: int) -> str:
    """The longest run of whole sentences from the start of `text` that `count_tokens` puts within `limit`.

    If the first sentence alone is too long, as many of its first words as fit.
    """
    sentences = split_sentences(text)
    for parts in (sentences, sentences[0].split() if sentences else []):
        for end in range(len(parts), 0, -1):
            if count_tokens(prefix := " ".join(parts[:end])) <= limit:
                return prefix
    return ""
