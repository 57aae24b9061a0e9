"""Real text and images that come with installed packages, in deterministic batches.

Text is the language reference in ``pydoc_data.topics`` (standard library, 465,048 characters of English);
images are scikit-learn's handwritten digits. The same arguments give the same batches in every process.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from functools import lru_cache
from pydoc_data.topics import topics
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lowmem_compile.demo.packages import require

Batch = dict[str, Tensor]

# Public-domain structures, written as SMILES; joined with "." they are input for the reaction model.
MOLECULES = (
    "CC(=O)Oc1ccccc1C(=O)O",  # aspirin
    "Cn1cnc2c1c(=O)n(C)c(=O)n2C",  # caffeine
    "CC(=O)Nc1ccc(O)cc1",  # paracetamol
    "CC(C)Cc1ccc(C(C)C(=O)O)cc1",  # ibuprofen
    "COc1cc(C=O)ccc1O",  # vanillin
    "O=C(O)c1ccccc1O",  # salicylic acid
    "NCCc1ccc(O)c(O)c1",  # dopamine
    "CC(N)C(=O)O",  # alanine
    "OCC(O)CO",  # glycerol
    "c1ccc2ccccc2c1",  # naphthalene
    "CCN(CC)CC",  # triethylamine
    "CC(=O)OC(C)=O",  # acetic anhydride
)


class Tokenizer(Protocol):
    """What the batches need of a tokenizer: ids of a text, without special tokens."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of ``text``."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0 ... 255, for models with random weights, which have no vocabulary of their own."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:  # noqa: ARG002
        """Token ids of ``text``."""
        return list(text.encode())


class SmilesTokenizer:
    """Greedy longest match over a vocabulary; unknown characters become ``[UNK]``."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.ids = {token: i for i, token in enumerate(vocabulary)}
        self.longest = max(map(len, vocabulary))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:  # noqa: ARG002
        """Token ids of ``text``."""
        ids, at = [], 0
        while at < len(text):
            size = next((n for n in range(self.longest, 0, -1) if text[at : at + n] in self.ids), 1)
            ids.append(self.ids.get(text[at : at + size], self.ids["[UNK]"]))
            at += size
        return ids


@lru_cache(maxsize=1)
def corpus() -> str:
    """The whole text, topics in alphabetic order."""
    return "\n\n".join(topics[name] for name in sorted(topics))


@lru_cache(maxsize=1)
def paragraphs() -> tuple[tuple[str, ...], ...]:
    """Paragraphs of prose by topic: at least 80 characters each, white space collapsed."""
    by_topic = []
    for name in sorted(topics):
        blocks = (re.sub(r"\s+", " ", block).strip() for block in re.split(r"\n\s*\n", topics[name]))
        prose = tuple(b for b in blocks if len(b) >= 80 and sum(c.isalpha() or c == " " for c in b) > 0.85 * len(b))
        if len(prose) > 1:
            by_topic.append(prose)
    return tuple(by_topic)


def causal_lm_batches(tokenizer: Tokenizer, *, rows: int, length: int, count: int) -> list[Batch]:
    """Consecutive windows of the text: ``input_ids`` and ``labels``, int64 [rows, length]."""
    need = rows * length * count
    ids = torch.tensor(_first_tokens(tokenizer, need)).view(count, rows, length)
    return [{"input_ids": x.clone(), "labels": x.clone()} for x in ids]


def text_pair_batches(tokenizer: Any, *, rows: int, length: int, count: int) -> list[Batch]:
    """Neighbouring paragraphs as positive pairs, padded: row i and row i + rows / 2 belong together.

    ``tokenizer`` is a Hugging Face tokenizer. Returns ``input_ids`` and ``attention_mask``, int64 [rows,
    length].
    """
    pairs = list(itertools.chain.from_iterable(zip(p[::2], p[1::2], strict=False) for p in paragraphs()))
    half = rows // 2
    if half * count > len(pairs):
        raise ValueError(f"{half * count} pairs asked, the text has {len(pairs)}: ask for fewer or smaller batches")
    batches = []
    for i in range(count):
        chosen = pairs[i * half : (i + 1) * half]
        texts = [a for a, _ in chosen] + [b for _, b in chosen]
        out = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        batches.append({"input_ids": out["input_ids"], "attention_mask": out["attention_mask"]})
    return batches


def classified_text_batches(tokenizer: Tokenizer, *, rows: int, length: int, count: int) -> list[Batch]:
    """Windows of the text labelled by the half of the alphabet that their batch row comes from.

    Returns ``input_ids``, int64 [rows, length], and ``labels``, int64 [rows] in {0, 1}.
    """
    text = corpus()
    halves = (text[: len(text) // 2], text[len(text) // 2 :])
    streams = [_first_tokens(tokenizer, rows * length * count, half) for half in halves]
    labels = torch.arange(rows) % 2
    batches = []
    for i in range(count):
        starts = [(i * rows + row) * length for row in range(rows)]
        ids = [streams[row % 2][start : start + length] for row, start in enumerate(starts)]
        batches.append({"input_ids": torch.tensor(ids), "labels": labels.clone()})
    return batches


def masked_smiles_batches(vocabulary: Sequence[str], *, rows: int, length: int, count: int) -> list[Batch]:
    """Mixtures of small molecules with 15 % of the tokens masked.

    Returns ``input_ids`` and ``labels``, int64 [rows, length]; labels are -100 where nothing is masked.
    """
    tokenizer = SmilesTokenizer(vocabulary)
    generator = torch.Generator().manual_seed(0)
    encoded = [tokenizer.encode(m + ".", add_special_tokens=False) for m in MOLECULES]
    batches = []
    for _ in range(count):
        ids = torch.empty(rows, length, dtype=torch.long)
        for row in ids:
            order = torch.randint(len(encoded), (length,), generator=generator).tolist()
            stream = itertools.chain.from_iterable(encoded[i] for i in order)
            row.copy_(torch.tensor(list(itertools.islice(stream, length))))
        masked = torch.rand(rows, length, generator=generator) < 0.15
        labels = ids.masked_fill(~masked, -100)
        batches.append({"input_ids": ids.masked_fill(masked, tokenizer.ids["[MASK]"]), "labels": labels})
    return batches


def digit_batches(*, rows: int, size: int, count: int) -> list[Batch]:
    """Handwritten digits, resized.

    Returns ``pixel_values``, float32 [rows, 3, size, size] in -1 ... 1, and ``labels``, int64 [rows].
    """
    require("sklearn")
    digits = require("sklearn.datasets").load_digits()
    if rows * count > len(digits.images):
        raise ValueError(f"{rows * count} images asked, the data set has {len(digits.images)}")
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    batches = []
    for i in range(count):
        part = slice(i * rows, (i + 1) * rows)
        large = F.interpolate(images[part], size=(size, size), mode="bilinear", antialias=False)
        batches.append({"pixel_values": large.expand(-1, 3, -1, -1).contiguous(), "labels": labels[part].long()})
    return batches


def _first_tokens(tokenizer: Tokenizer, need: int, text: str | None = None) -> list[int]:
    """The first ``need`` tokens of the text (of the corpus by default).

    Raises:
        ValueError: the text has fewer.
    """
    text = corpus() if text is None else text
    ids = tokenizer.encode(text[: 8 * need], add_special_tokens=False)
    if len(ids) < need:
        ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) < need:
        raise ValueError(f"{need} tokens asked, the text has {len(ids)}: ask for fewer or smaller batches")
    return ids[:need]
