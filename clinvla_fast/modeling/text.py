"""The report tower: a Hugging Face BERT with adapters in it, fed with packed reports."""

from torch import Tensor, nn
from transformers import BertModel

from ..recipe import Recipe
from .adapters import InvertibleAdapter, TransformerAdapt, add_adapters
from .attention import attention
from .checkpoints import KeyReport, take_adapters
from .packing import Packing


def text_block(layer: nn.Module, adapt: TransformerAdapt, x: Tensor, packing: Packing) -> Tensor:
    """A post-norm BERT layer, adapted: packed tokens [total, H] to the same."""
    own, output = layer.attention.self, layer.attention.output
    q, k, v = (p(x).unflatten(-1, (own.num_attention_heads, -1)) for p in (own.query, own.key, own.value))
    x = adapt.attend(output.dense(attention(q, k, v, packing).flatten(1)), x, output.LayerNorm)
    return adapt(layer.output.dense(layer.intermediate(x)), x, x, layer.output.LayerNorm)


class TextTower(nn.Module):
    """A BERT that reads packed reports, each attending to itself alone.

    Args:
        bert: with absolute positions, as BERT and BioBERT have them.
    """

    key_report: KeyReport | None = None
    """What became of every key of the file that it was read from; None where a library has read it."""

    def __init__(self, bert: BertModel):
        super().__init__()
        self.bert = bert
        self.adapts = nn.ModuleList(TransformerAdapt(bert.config.hidden_size) for _ in bert.encoder.layer)
        self.run_block = text_block  # or its compiled twin
        self.invertible: InvertibleAdapter | None = None
        self.found_adapters: dict[str, tuple[str, Tensor]] = {}  # in its file: see `alta_adapters`

    def add_adapters(self, recipe: Recipe) -> None:
        self.invertible = add_adapters(self.adapts, recipe, self.width)
        take_adapters(self, recipe)

    @property
    def width(self) -> int:
        return self.bert.config.hidden_size

    @property
    def max_tokens(self) -> int:
        return self.bert.config.max_position_embeddings

    @property
    def word_embeddings(self) -> nn.Embedding:
        return self.bert.embeddings.word_embeddings

    def embed(self, tokens: Tensor, packing: Packing) -> Tensor:
        """BERT's input embeddings of packed tokens [total], each report's positions from 0: [total, width]."""
        e = self.bert.embeddings
        words = e.word_embeddings(tokens) + e.token_type_embeddings.weight[0]
        return e.LayerNorm(words + e.position_embeddings(packing.column))

    def forward(self, tokens: Tensor, packing: Packing, added: Tensor | None = None) -> Tensor:
        """Hidden states of packed tokens.

        Args:
            tokens: int64 [total].
            packing: of the reports' lengths.
            added: [B, width], to the embeddings of every word of a report.

        Returns:
            [total, width].

        Raises:
            ValueError: if a report is longer than the positions that this BERT has.
        """
        if packing.mask.shape[1] > self.max_tokens:
            raise ValueError(f"a report has {packing.mask.shape[1]} tokens: this BERT reads {self.max_tokens} at most.")
        x = self.embed(tokens, packing)
        if added is not None:
            x = x + added[packing.row].to(x.dtype)
        if self.invertible is not None:
            x = self.invertible(x)
        for layer, adapt in zip(self.bert.encoder.layer, self.adapts, strict=True):
            x = self.run_block(layer, adapt, x, packing)
        return x
