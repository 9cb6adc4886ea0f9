"""The model card of a run: what was trained, on which data, how far, and with which scores."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from .versions import versions

MAKERS = ("clinvla-fast", "torch", "triton", "xformers", "timm", "transformers", "nvidia-dali-cuda120")

_USE = """
## Use

```python
{}
```

For research. It is no medical device and must not decide about patients.
"""
_CLINVLA = 'from clinvla_fast import ClinVLA\n\nmodel = ClinVLA.from_pretrained("this folder")'


def model_card(
    about: Mapping[str, Mapping[str, Any]], step: str, scores: Mapping[str, Any], use: str = _CLINVLA
) -> str:
    """A README.md with the metadata that the Hugging Face Hub reads.

    Args:
        about: tables by their titles.
        step: where training stands, in words.
        scores: the last ones that were measured.
        use: the Python lines that load it.
    """
    data = ModelCardData(license="apache-2.0", library_name="clinvla-fast", tags=["chest-xray", "vision-language"])
    tables = {**about, "Scores": scores or {"none yet": ""}, "Versions": versions(MAKERS)}
    parts = [f"---\n{data.to_yaml()}\n---\n# A model of clinvla_fast\n\n{step}\n"]
    for title, table in tables.items():
        rows = "".join(f"| {name} | {_shown(value)} |\n" for name, value in table.items())
        parts.append(f"\n## {title}\n\n| | |\n| --- | --- |\n{rows}")
    return "".join(parts) + _USE.format(use)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
