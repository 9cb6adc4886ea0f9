"""What `bench.compare` measures of a revision, by name, and the process that measures it:

    python bench/cases.py TREE DEVICE

`clinvla_fast` is that of TREE; this file, and what it takes from `bench`, are of the current checkout. Of each line on
standard input, {"make": NAME} or {"turn": CALLS}, an answer is a line on standard output: {"seconds": of a call}, or
{"error": why there is none}. What a revision lacks must be met within a case: only there is it the case's reason.
"""

import copy
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

Run = Callable[[], object]


def operation(make: str, *arguments, **options) -> Callable[[str], Run]:
    """Forward and backward, in float32 on a CPU, else in bfloat16."""

    def case(device: str) -> Run:
        import torch

        from bench.operations import Make

        made = getattr(Make(device, torch.float32 if device == "cpu" else torch.bfloat16), make)(*arguments, **options)
        return partial(made.step, made.ours)

    return case


def encoding(device: str) -> Run:
    """Towers of the published size: two views and a report a study."""
    import torch

    from bench.towers import Batch, our_encoding, our_towers, plain_towers
    from clinvla_fast.modeling.frozen import compute_dtype

    towers = our_towers(plain_towers().eval(), compute_dtype(torch.device(device)), adapters=True).to(device)
    return torch.no_grad()(partial(our_encoding, towers, Batch.of(2 if device == "cpu" else 64, device)))


def pretraining_step(device: str) -> Run:
    """Of the tiny preset."""
    model, loader = copy.deepcopy(_tiny()[0]).to(device), _tiny_loader("cpu")
    batch = next(iter(loader)).to(device)

    def step() -> None:
        model.objective(model(batch, 0))["loss"].backward()
        model.zero_grad(set_to_none=True)

    return step


def a_pass(device: str) -> Run:
    """Of the loader, which decodes all films."""
    loader = _tiny_loader("cpu" if device == "cpu" else "gpu")
    return lambda: sum(len(batch) for batch in loader)


def _tiny_loader(device: str) -> Iterable:
    from clinvla_fast.data.loader import StudyLoader

    model, data = _tiny()
    sizes = {"image_size": model.vision.image_size, "max_tokens": model.max_tokens, "batch_size": 32}
    return StudyLoader(data, "train", model.tokenizer, train=True, device=device, cache="off", **sizes)


def _tiny() -> tuple:
    """The model, and where its studies are."""
    from bench.phantoms import TINY, phantoms, tiny_model

    data = phantoms(TINY, patients=60)
    return tiny_model(data), data


def clip_loss(device: str) -> Run:
    import torch
    from torch.nn.functional import normalize

    from clinvla_fast.losses import ClipLoss

    torch.manual_seed(0)
    inputs = [normalize(x, dim=1).requires_grad_() for x in torch.randn(2, 4096, 512, device=device)]
    scale = torch.tensor(1 / 0.07, device=device)
    return lambda: torch.autograd.grad(ClipLoss()(*inputs, scale), inputs)


def gloria_local_loss(device: str) -> Run:
    import torch

    from clinvla_fast.losses import local_loss

    torch.manual_seed(0)
    image = torch.randn(16, 768, 19, 19, device=device, requires_grad=True)
    text = torch.randn(16, 768, 97, device=device, requires_grad=True)
    lengths = torch.randint(10, 98, (16,)).tolist()
    return lambda: torch.autograd.grad(sum(local_loss(image, text, lengths)[:2]), (image, text))


def reading(device: str) -> Run:
    """A film of 2,000 pixels a side in 16 bits, as `training.prepare` does."""
    import numpy as np
    from PIL import Image

    from clinvla_fast.data.phantom import phantom_studies
    from clinvla_fast.data.quality import Quality
    from clinvla_fast.data.radiographs import Reading, read_radiograph

    frontal = next(iter(phantom_studies(1, size=512))).images["frontal"]
    path = Path(tempfile.mkdtemp()) / "film.png"
    Image.fromarray(np.asarray(Image.fromarray(frontal).resize((2000, 2000))).astype(np.uint16) * 128).save(path)
    return lambda: read_radiograph(path, 256, Reading(quality=Quality()))


CASES: dict[str, Callable[[str], Run]] = {
    "invertible adapter": operation("invertible", 4096),
    "transformer-adapt": operation("adapt", 4096, normed=False),
    "transformer-adapt with its norm": operation("adapt", 4096, normed=True),
    "masked patches": operation("embed", 32, trained=True),
    "local alignment": operation("align", 37),
    "InfoNCE": operation("contrast", 4096, sigmoid=False),
    "sigmoid loss": operation("contrast", 4096, sigmoid=True),
    "ClipLoss": clip_loss,
    "GLoRIA's local loss": gloria_local_loss,
    "encoding, published size": encoding,
    "pretraining step, tiny": pretraining_step,
    "loader pass": a_pass,
    "reading a film": reading,
}


def main() -> None:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print
    tree, device = Path(sys.argv[1]).resolve(), sys.argv[2]
    sys.path[0] = str(tree)  # before this file's own folder, and before what is installed
    import torch

    import clinvla_fast

    found = Path(clinvla_fast.__file__).resolve()
    if not found.is_relative_to(tree):
        sys.exit(f"clinvla_fast is {found}: expected that of {tree}.")
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # from here on: `bench`, as clinvla_fast has been found
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    run: Run = lambda: None  # noqa: E731

    def turn(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        finish()
        return (time.perf_counter() - start) / calls

    for line in sys.stdin:
        told = json.loads(line)
        try:
            if "make" in told:
                torch.manual_seed(0)
                run = CASES[told["make"]](device)
                turn(1)  # compiles and fills caches
            answer = {"seconds": turn(told.get("calls", 1))}
        except Exception as error:
            reason = str(error).strip().splitlines()
            answer = {"error": f"{type(error).__name__}: {reason[0] if reason else ''}"}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
