"""Files and sentences through a model that embeds batches."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from ..data.radiographs import read_radiograph
from ..data.reports import clean_report
from ..data.tokenizer import tokenize_reports
from ..errors import DataError
from ..study import VIEWS


class Encoding:
    """Of a model with `embed_images` and `embed_reports`, an image tower (`vision`), a tokenizer and a recipe."""

    @torch.inference_mode()
    def encode_images(self, studies: Sequence[Mapping[str, str | Path | np.ndarray]], batch_size: int = 32) -> Tensor:
        """Global embeddings of studies, L2-normalised.

        Args:
            studies: each maps names of VIEWS ("frontal", "lateral", "prior_frontal", "prior_lateral") to a file
                (PNG, JPEG or DICOM) or to pixels, uint8 [H, W]. Any view may be missing, but not all.

        Returns:
            [len(studies), D] on the model's device.

        Raises:
            DataError: if a study has no view that the recipe looks at, or a name that is none of VIEWS, or a file
                cannot be read, or pixels are no uint8 [H, W].
        """
        parts = []
        for start in range(0, len(studies), batch_size):
            images = self.read_images(studies[start : start + batch_size], start)
            parts.append(normalize(self.embed_images(*images)[0], dim=-1))
        return torch.cat(parts) if parts else torch.empty(0, self.width, device=self.device)

    def read_images(
        self, studies: Sequence[Mapping[str, str | Path | np.ndarray]], first: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Studies as the image tower takes them.

        Args: as `encode_images`; first: the number of the first study, for errors.

        Returns:
            uint8 [len(studies), 4, image_size, image_size] and bool [len(studies), 4] on the model's device.

        Raises:
            DataError: as `encode_images`.
        """
        size = self.vision.image_size
        images = np.zeros((len(studies), len(VIEWS), size, size), np.uint8)
        present = np.zeros((len(studies), len(VIEWS)), bool)
        for row, study in enumerate(studies):
            number = first + row
            if not study or set(study) - set(VIEWS):
                known = ", ".join(VIEWS)
                raise DataError(f"study {number} has views {sorted(study)}: expected one or more of {known}.")
            if not set(study) & set(self.recipe.views):
                seen = ", ".join(self.recipe.views)
                raise DataError(f"study {number} has views {sorted(study)}: this model looks at {seen} alone.")
            for view, image in study.items():
                column = VIEWS.index(view)
                pixels = image if isinstance(image, np.ndarray) else read_radiograph(image, size)
                if pixels.dtype != np.uint8 or pixels.ndim != 2 or not pixels.size:
                    got = f"{pixels.dtype} {list(pixels.shape)}"
                    raise DataError(f"study {number}: {view} is {got}: expected pixels, uint8 [H, W].")
                images[row, column] = Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR)
                present[row, column] = True
        return torch.from_numpy(images).to(self.device), torch.from_numpy(present).to(self.device)

    @torch.inference_mode()
    def encode_reports(self, reports: Sequence[str], batch_size: int = 64) -> Tensor:
        """Global embeddings of reports or shorter descriptions, L2-normalised: [len(reports), D].

        They are cleaned as in `training.prepare` (abbreviations, hedges, sections) and cut to whole sentences.
        """
        parts = []
        for start in range(0, len(reports), batch_size):
            cleaned = [clean_report(report) for report in reports[start : start + batch_size]]
            tokens, lengths = tokenize_reports(self.tokenizer, cleaned, self.max_tokens)
            parts.append(normalize(self.embed_reports(tokens.to(self.device), lengths)[0], dim=-1))
        return torch.cat(parts) if parts else torch.empty(0, self.width, device=self.device)
