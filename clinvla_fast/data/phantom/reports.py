"""Raw radiology reports for phantom studies: varied in wording and layout, never at odds with the truth."""

import random

from clinvla_fast.data.phantom.findings import NO_FINDING, POSTERIOR, Finding, StudyTruth

_LOBES = {
    "RUL": "right upper lobe",
    "RML": "right middle lobe",
    "RLL": "right lower lobe",
    "LUL": "left upper lobe",
    "LLL": "left lower lobe",
}
# Upper bounds of the severity bands with a word for how much and one for how big.
_BANDS = (
    (1 / 3, ("mild", "slight"), ("small",)),
    (2 / 3, ("moderate",), ("moderate", "moderate-sized")),
)
_TOP = (("severe", "marked"), ("large",))

# Noun phrases by label or kind. {much} and {big} are severity words; every phrase reads after "There is" or "Stable".
_PHRASES = {
    "cardiomegaly": (
        "{much} cardiomegaly",
        "{much} enlargement of the cardiac silhouette",
        "{much} cardiac enlargement",
    ),
    "pleural effusion": (
        "a {big} {side} pleural effusion",
        "a {big} {side}-sided pleural effusion",
        "a {big} pleural effusion on the {side}",
        "{big} {side} pleural fluid with a meniscus",
    ),
    "bilateral": (
        "{big} bilateral pleural effusions",
        "{big} pleural effusions on both sides",
        "{big} bilateral pleural fluid",
    ),
    POSTERIOR: (
        "a small {side} pleural effusion seen only on the lateral view",
        "blunting of the {side} posterior costophrenic angle by a small pleural effusion",
        "a small {side} pleural effusion layering in the posterior costophrenic sulcus",
    ),
    "pneumothorax": (
        "a {big} {side} pneumothorax",
        "a {big} {side} apical pneumothorax",
        "a {big} {side} PTX",
        "a {big} {side}-sided pneumothorax with a visible pleural line",
    ),
    "consolidation": (
        "{much} {lobe} consolidation",
        "{much} consolidation in the {lobe}",
        "{much} airspace consolidation of the {lobe}",
        "{much} focal consolidation within the {lobe}",
    ),
    "edema": (
        "{much} pulmonary edema",
        "{much} interstitial pulmonary edema",
        "{much} bilateral perihilar edema",
        "CHF with {much} pulmonary edema",
    ),
    "nodule": (
        "a {cm} cm {lobe} nodule",
        "a {cm}-cm nodule in the {lobe}",
        "a {mm} mm rounded nodule in the {lobe}",
        "a {cm} cm x {cm} cm {lobe} nodule",
    ),
    "pacemaker": (
        "a left-sided pacemaker with leads in the right atrium and right ventricle",
        "a left chest wall dual-lead pacemaker",
        "a left pectoral pacemaker generator with intact leads",
    ),
    "endotracheal tube": (
        "an endotracheal tube with its tip above the carina",
        "an ETT in standard position",
        "an endotracheal tube (ETT) terminating above the carina",
    ),
    "central line": (
        "a right subclavian central line with its tip in the SVC",
        "a right central venous catheter ending in the SVC",
        "a right-sided central line terminating in the superior vena cava",
    ),
    "fracture": (
        "a compression fracture of {kind}",
        "a {kind} vertebral compression fracture with {loss}% loss of height",
        "a wedge compression fracture of the {kind} vertebral body on the lateral view",
    ),
}
_HEDGES = {
    "cardiomegaly": (", likely chronic",),
    "pleural effusion": (", likely reactive", ", which may represent a parapneumonic process"),
    "pneumothorax": (", likely spontaneous",),
    "consolidation": (", which may represent pneumonia", ", likely infectious", "; aspiration cannot be excluded"),
    "edema": (", likely due to fluid overload", ", which may be cardiogenic"),
    "nodule": ("; malignancy cannot be excluded", ", which may represent a primary neoplasm", ", likely a granuloma"),
    "fracture": (", likely osteoporotic", ", of indeterminate age"),
}
_COURSES = {
    "": ("There is {np}.", "{Np} is noted.", "{Np}.", "The radiograph shows {np}."),
    "new": (
        "New {bare}.",
        "{Np}, new since the prior study.",
        "Interval development of {np}.",
        "There is {np}, not present previously.",
    ),
    "improved": (
        "Interval improvement in {np}.",
        "{Np}, decreased compared to the prior study.",
        "{Np}, improved since ___.",
        "There is {np}, which has decreased from prior.",
    ),
    "worsened": (
        "Interval worsening of {np}.",
        "{Np}, which has increased compared to the prior study.",
        "{Np}, worse than on ___.",
        "There is {np}, increased from prior.",
    ),
    "stable": (
        "Unchanged {bare}.",
        "Stable {bare}.",
        "{Np}, not significantly changed from prior.",
        "There is {np}, unchanged compared to ___.",
    ),
}
# A second sentence for FINDINGS, so that what is present outweighs what is not.
_DETAILS = {
    "cardiomegaly": (
        "The cardiothoracic ratio measures approximately {ratio:.2f}.",
        "The heart is enlarged with a cardiothoracic ratio of {ratio:.2f}.",
    ),
    "pleural effusion": (
        "Fluid obscures the {side} hemidiaphragm and costophrenic angle.",
        "The {side} costophrenic angle is blunted by fluid.",
    ),
    "bilateral": (
        "Fluid obscures both hemidiaphragms and costophrenic angles.",
        "Both costophrenic angles are blunted by fluid.",
    ),
    POSTERIOR: (
        "It is not visible on the frontal view.",
        "The fluid lies in the {side} posterior sulcus and is hidden on the frontal view.",
    ),
    "pneumothorax": (
        "The {side} lung is partially collapsed with a lateral and apical rim of air.",
        "A {side} pleural line is visible with no lung markings beyond it.",
    ),
    "consolidation": (
        "Dense airspace opacity projects over the {lobe}.",
        "There is patchy opacity with obscured vessels in the {lobe}.",
    ),
    "edema": (
        "There is perihilar haziness with interstitial thickening in both lungs.",
        "Diffuse bilateral interstitial markings and vascular congestion are seen.",
    ),
    "nodule": (
        "The lesion is round, well circumscribed and measures {cm} cm.",
        "The rounded lesion in the {lobe} measures {mm} mm in diameter.",
    ),
    "pacemaker": (
        "The generator projects over the left upper chest and the leads are intact.",
        "Leads course from the left pectoral generator to the right heart.",
    ),
    "endotracheal tube": (
        "The tube projects over the trachea in the midline.",
        "The patient is intubated.",
    ),
    "central line": (
        "The catheter enters from the right and follows the superior vena cava.",
        "The right-sided catheter courses along the right mediastinal border.",
    ),
    "fracture": (
        "There is approximately {loss}% loss of height of the {kind} vertebral body.",
        "The {kind} vertebral body is flattened and sclerotic on the lateral view, with {loss}% height loss.",
    ),
}
_RESOLVED = (
    "Previously seen {bare} has resolved.",
    "Interval resolution of the {bare}.",
    "The {bare} seen on the prior study has resolved.",
)
_RESOLVED_NAMES = {"edema": "pulmonary edema", "support devices": "support device"}
_ABSENT = {
    "pleural effusion": "pleural effusion",
    "pneumothorax": "pneumothorax",
    "consolidation": "focal consolidation",
    "edema": "pulmonary edema",
    "nodule": "suspicious nodule",
    "fracture": "acute fracture",
}
_NORMAL_HEART = ("The heart size is normal.", "Cardiac silhouette is within normal limits.", "Heart size is normal.")
_CLEAR = ("The lungs are clear.", "Lungs are clear and well expanded.", "The lungs are clear bilaterally.")
_NOTHING = (
    "No acute cardiopulmonary process.",
    "Normal chest radiograph.",
    "No acute cardiopulmonary abnormality.",
    "No evidence of acute disease.",
)
_INDICATIONS = (
    "___ year old with shortness of breath.",
    "Cough and fever.",
    "___-year-old man with chest pain.",
    "___F with dyspnea on exertion.",
    "Follow-up.",
    "Preoperative evaluation.",
    "Back pain, fall.",
)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _bare(phrase: str) -> str:
    return phrase.removeprefix("an ").removeprefix("a ")


def _key(finding: Finding) -> str:
    """The finding's entry in _PHRASES and _DETAILS."""
    if finding.label == "pleural effusion" and finding.side == "bilateral":
        return "bilateral"
    return finding.kind if finding.kind in _PHRASES else finding.label


def _words(rng: random.Random, finding: Finding) -> dict:
    """What the templates of _PHRASES and _DETAILS may ask for."""
    much, big = next((words for bound, *words in _BANDS if finding.severity < bound), _TOP)
    return {
        "much": rng.choice(much),
        "big": rng.choice(big),
        "side": finding.side,
        "lobe": rng.choice((finding.lobe, _LOBES[finding.lobe], _LOBES[finding.lobe])) if finding.lobe else "",
        "cm": f"{finding.diameter / 10:.1f}",
        "mm": round(finding.diameter),
        "kind": finding.kind,
        "ratio": finding.heart_ratio,
        "loss": round(100 * (1 - finding.height_left) / 5) * 5,
    }


def _positive(rng: random.Random, finding: Finding, *, hedge: float) -> str:
    np = rng.choice(_PHRASES[_key(finding)]).format(**_words(rng, finding))
    sentence = rng.choice(_COURSES[finding.change]).format(np=np, Np=_capital(np), bare=_bare(np))
    if "effusions" in np:
        sentence = (
            sentence.replace("There is", "There are")
            .replace(" is noted", " are noted")
            .replace("which has", "which have")
        )
    if rng.random() < hedge and finding.label in _HEDGES and sentence.endswith(np + "."):
        sentence = sentence[:-1] + rng.choice(_HEDGES[finding.label]) + "."
    return sentence


def _resolved(rng: random.Random, finding: Finding) -> str:
    where = {"left": "left ", "right": "right ", "bilateral": "bilateral "}.get(finding.side, "")
    name = finding.kind if finding.label == "support devices" else _RESOLVED_NAMES.get(finding.label, finding.label)
    if finding.label == "support devices":
        return f"The {name} has been removed."
    return rng.choice(_RESOLVED).format(bare=where + name)


def _normal(rng: random.Random, truth: StudyTruth) -> list[str]:
    """Statements about what is not there; at most two next to positive findings, so that they do not drown them."""
    present = set(truth.labels)
    absent = [x for x in _ABSENT if x not in present and (truth.lateral or x != "fracture")]
    rng.shuffle(absent)
    named = [_ABSENT[x] for x in absent[: rng.randint(2, 3)]]
    joined = f"{', '.join(named[:-1])} or {named[-1]}"
    lines = [rng.choice((f"No {joined}.", f"There is no {joined}.", f"No evidence of {joined}."))]
    if "cardiomegaly" not in present:
        lines.append(rng.choice(_NORMAL_HEART))
    if not present & {"consolidation", "edema", "nodule", "pneumothorax", "pleural effusion"}:
        lines.append(rng.choice(_CLEAR))
    lines.append(rng.choice(("Mediastinal contours are unremarkable.", "Hilar contours are normal.")))
    rng.shuffle(lines)
    return lines if NO_FINDING in present else lines[: rng.randint(1, 2)]


def write_report(truth: StudyTruth) -> str:
    """The raw report of one study; a pure function of the truth.

    Sections come as EXAMINATION, INDICATION, COMPARISON, FINDINGS and IMPRESSION, some of them missing, in several
    heading styles. "___" stands for what de-identification removed.
    """
    rng = random.Random(truth.seed)
    gone = [_resolved(rng, f) for f in truth.resolved]
    details = []
    for f in truth.findings:
        details += [_positive(rng, f, hedge=0.2), rng.choice(_DETAILS[_key(f)]).format(**_words(rng, f))]
    summary = [_positive(rng, f, hedge=0.45) for f in truth.findings]
    if not summary:
        summary = [rng.choice(_NOTHING)]
        if truth.followup and not gone and rng.random() < 0.6:
            summary.append(rng.choice(("Unchanged from prior.", "No interval change.")))
    if gone and rng.random() < 0.6:
        summary += gone
    normal = _normal(rng, truth)
    views = (
        rng.choice(("PA AND LATERAL", "FRONTAL AND LATERAL", "TWO VIEWS"))
        if truth.lateral
        else rng.choice(("PORTABLE AP", "SINGLE FRONTAL VIEW"))
    )
    sections = {"EXAMINATION": f"CHEST RADIOGRAPH, {views}"}
    if rng.random() < 0.75:
        sections["INDICATION"] = rng.choice(_INDICATIONS)
    sections["COMPARISON"] = (
        rng.choice(("___.", "Prior study from ___.", "Radiograph of ___.")) if truth.followup else "None."
    )
    if not truth.followup and rng.random() < 0.5:
        del sections["COMPARISON"]
    if rng.random() < 0.12:
        summary = summary + [line for line in gone if line not in summary] + normal[:2]
    else:
        body = details + gone
        sections["FINDINGS"] = " ".join(body + normal if rng.random() < 0.7 else normal[:1] + body + normal[1:])
    numbered = len(summary) > 1 and rng.random() < 0.4
    sections["IMPRESSION"] = (
        " ".join(f"{i}. {line}" for i, line in enumerate(summary, 1)) if numbered else " ".join(summary)
    )
    order = list(sections)
    if "FINDINGS" in sections and rng.random() < 0.08:  # some reports put the conclusion first
        order.remove("IMPRESSION")
        order.insert(order.index("FINDINGS"), "IMPRESSION")
    heading = rng.choice((str.upper, str.upper, str.title))
    gap, between = rng.choice((" ", " ", "\n")), rng.choice(("\n", "\n\n", "\n\n"))
    return between.join(f"{heading(name)}:{gap}{sections[name]}" for name in order) + "\n"
