"""Small enough to learn something on two CPU cores in minutes.

Its steps are few, so its learning rates are high, and its scales start low: from 1/0.07 the first loss is far above
chance, and its gradient collapses the embeddings for the first hundred steps. At its width bfloat16 is no faster, and
costs retrieval.
"""

from .preset import Preset

PRESET = Preset(
    vision=None,
    text=None,
    precision="float32",
    every={
        "width": 64,
        "epochs": 36,
        "schedule_epochs": None,
        "batch_size": 32,
        "warmup": 0.05,
        "language_lr": 1e-3,
        "task_lr": 1.5e-3,
        "tower_lr": 5e-4,
        "scales": (5.0, 4.0, 5.0, 1.5),
        "target_scale": 1,
        "decoder_blocks": 1,
    },
    of_method={
        "clinvla": {"language_lr": 3e-3, "task_lr": 4.5e-3},
        "alta": {"bottleneck": 32, "language_lr": 1.5e-3},
        "adaptor": {"width": 128, "weight_decay": 1e-4},
        "mrm": {"tower_lr": 3e-3, "task_lr": 3e-3},
        "gloria": {"scales": (10.0, 4.0, 5.0, 10.0), "clip": 1.0},
        "convirt": {"scales": (10.0, 4.0, 5.0, 10.0)},
    },
)
