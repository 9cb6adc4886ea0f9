"""Reports as packed word pieces."""

from collections.abc import Iterable, Sequence

import torch
from tokenizers import BertWordPieceTokenizer
from torch import Tensor
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from .reports import truncate_sentences


def train_tokenizer(reports: Iterable[str], vocabulary: int = 2000) -> PreTrainedTokenizerFast:
    """A lower-case BERT word-piece tokenizer of at most `vocabulary` pieces, made from `reports`."""
    pieces = BertWordPieceTokenizer(lowercase=True)
    pieces.train_from_iterator(reports, vocab_size=vocabulary, min_frequency=2, show_progress=False)
    return BertTokenizerFast(tokenizer_object=pieces._tokenizer, do_lower_case=True)


def tokenize_reports(
    tokenizer: PreTrainedTokenizerFast, reports: Sequence[str], max_tokens: int
) -> tuple[Tensor, Tensor]:
    """Word pieces of each report with CLS and SEP, cut after the last whole sentence that fits.

    Returns:
        tokens int64 [total] and lengths int64 [len(reports)], each at most `max_tokens`.
    """

    def pieces(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    room = max_tokens - 2
    encoded = []
    for report in reports:
        ids = pieces(report)
        if len(ids) > room:
            ids = pieces(truncate_sentences(report, lambda text: len(pieces(text)), room))[:room]
        encoded.append([tokenizer.cls_token_id, *ids, tokenizer.sep_token_id])
    tokens = torch.tensor([i for ids in encoded for i in ids], dtype=torch.int64)
    return tokens, torch.tensor([len(ids) for ids in encoded], dtype=torch.int64)
