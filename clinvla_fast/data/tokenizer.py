"""Reports as packed word pieces."""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from tokenizers import BertWordPieceTokenizer, Tokenizer
from torch import Tensor
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from .reports import truncate_sentences

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def train_tokenizer(reports: Iterable[str], vocabulary: int = 2000) -> PreTrainedTokenizerFast:
    """A lower-case BERT word-piece tokenizer of at most `vocabulary` pieces, made from `reports`.

    Its pieces are the words that occur more than once, the most frequent first, and single characters for the rest.
    (tokenizers' own trainer breaks ties at random, so that two runs would differ.)
    """
    blank = _of_pieces(_SPECIAL)
    words: Counter[str] = Counter()
    for report in reports:
        words.update(word for word, _ in blank.pre_tokenizer.pre_tokenize_str(blank.normalizer.normalize_str(report)))
    characters = sorted({character for word in words for character in word})
    pieces = [*_SPECIAL, *characters, *(f"##{character}" for character in characters)]
    ordered = sorted((word for word, count in words.items() if count > 1), key=lambda word: (-words[word], word))
    pieces = list(dict.fromkeys(pieces + ordered))[: max(vocabulary, len(pieces))]
    return BertTokenizerFast(tokenizer_object=_of_pieces(pieces), do_lower_case=True)


def _of_pieces(pieces: Iterable[str]) -> Tokenizer:
    """A lower-case BERT tokenizer; made here, as transformers 4 and 5 take a vocabulary differently."""
    bert = BertWordPieceTokenizer({piece: i for i, piece in enumerate(pieces)}, lowercase=True)
    return Tokenizer.from_str(bert.to_str())


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
