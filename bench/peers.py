"""Other libraries' models with random weights, seeded and at their own sizes: what ours are measured beside.

They are those of the extra `bench` in pyproject.toml, which pins their versions. Nothing is downloaded.
"""

import tomllib
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor, nn

from bench.stored import ROOT

MODULES = {"adapters": "adapters", "open_clip_torch": "open_clip", "hi-ml-multimodal": "health_multimodal.image.model"}
"""What is imported of each package."""


def pins() -> dict[str, str]:
    """The version of each package that is measured."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return dict(line.split("==") for line in extras["bench"] if "==" in line)


def missing(package: str) -> str:
    """Why a peer cannot be measured here, and what to do; nothing if it can."""
    pin = pins()[package]
    install = f"`pip install '{package}=={pin}'`"
    try:
        found = version(package)
        import_module(MODULES[package])
    except PackageNotFoundError:
        return f"it is not installed; {install}"
    except ImportError as error:
        return f"it cannot be imported ({error}); {install} beside the other packages of the extra `bench`"
    return "" if found == pin else f"version {found} is not what is measured; {install}"


def open_clip_vit() -> nn.Module:
    """open_clip's ViT-B-16: a ViT-B/16 of 224 x 224 pixels and a transformer of width 512 for texts of 77 words."""
    import open_clip

    torch.manual_seed(0)
    return open_clip.create_model("ViT-B-16", pretrained=None).eval()


class BioViLT(nn.Module):
    """hi-ml's BioViL-T: a ResNet-50 at 448 x 448 pixels with a transformer over two images, and a BERT."""

    def __init__(self) -> None:
        super().__init__()
        from health_multimodal.image.model.model import MultiImageModel
        from health_multimodal.text.model import CXRBertConfig, CXRBertModel

        torch.manual_seed(0)
        self.image = MultiImageModel(img_encoder_type="resnet50_multi_image", joint_feature_size=128)
        self.text = CXRBertModel(CXRBertConfig())
        self.eval()

    def forward(self, current: Tensor, prior: Tensor, words: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of an image with its prior one, [B, 3, 448, 448] each, and of reports."""
        image = self.image(current, prior).projected_global_embedding
        return image, self.text.get_projected_text_embeddings(words, mask.long())


def mad_x_bert() -> nn.Module:
    """A BERT-base with MAD-X's adapters by AdapterHub's `adapters`, of ClinVLA's sizes: a language adapter with an
    invertible one on the embeddings, a task adapter stacked on it. They are random; nothing else is trained."""
    import adapters
    from adapters.composition import Stack
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    bert = BertModel(config, add_pooling_layer=False)
    adapters.init(bert)
    bert.add_adapter("language", config=adapters.SeqBnInvConfig(reduction_factor=12))  # 64 of 768
    bert.add_adapter("task", config=adapters.SeqBnConfig(reduction_factor=12))
    bert.train_adapter(Stack("language", "task"))
    return bert
