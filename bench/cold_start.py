"""How long a new process takes to begin: `python -m bench.cold_start MODEL` prints seconds, as JSON.

libraries: to import PyTorch, timm and transformers; ours: to import this package after them; first, steady: a training
step of the saved MODEL.
"""

import json
import sys
from statistics import median
from time import perf_counter


def main() -> None:
    """Run the command line."""
    times = [perf_counter()]
    import timm
    import torch
    from transformers import AutoTokenizer, BertModel

    times.append(perf_counter())
    from clinvla_fast import ClinVLA, StudyBatch

    times.append(perf_counter())
    assert timm and AutoTokenizer and BertModel
    model, studies = ClinVLA.from_pretrained(sys.argv[1]), 32
    batch = StudyBatch(
        images=torch.zeros(studies, 2, model.vision.image_size, model.vision.image_size, dtype=torch.uint8),
        present=torch.ones(studies, 2, dtype=torch.bool),
        tokens=torch.ones(studies * 60, dtype=torch.int64),
        lengths=torch.full((studies,), 60),
    )
    steps = []
    for _ in range(6):
        start = perf_counter()
        model.objective(model(batch, 0))["loss"].backward()
        model.zero_grad(set_to_none=True)
        steps.append(perf_counter() - start)
    before, between, after = times
    first, *steady = steps
    found = {"libraries": between - before, "ours": after - between, "first": first, "steady": median(steady)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
