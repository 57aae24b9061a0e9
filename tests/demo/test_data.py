"""The batches are the same every time, and are what their docstrings say."""

from __future__ import annotations

from pydoc_data.topics import topics

import pytest
import torch

from lowmem_compile.demo import data
from lowmem_compile.demo.packages import INSTALL, MissingPackageError, folder, require

BYTES = data.ByteTokenizer()


class WordTokenizer:
    """Stands in for a Hugging Face tokenizer: one id a word, padded."""

    def __call__(self, texts: list[str], *, max_length: int, **_: object) -> dict[str, torch.Tensor]:
        rows = [[len(w) for w in t.split()][:max_length] for t in texts]
        ids = torch.tensor([r + [0] * (max_length - len(r)) for r in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def test_causal_windows_are_consecutive_text() -> None:
    a, b = data.causal_lm_batches(BYTES, rows=2, length=16, count=2)
    stream = torch.cat([a["input_ids"].flatten(), b["input_ids"].flatten()])
    assert bytes(stream.tolist()).decode() == data.corpus()[:64]
    assert torch.equal(a["labels"], a["input_ids"])


def test_the_text_does_not_depend_on_the_order_of_the_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    text = data.corpus()
    monkeypatch.setattr("lowmem_compile.demo.data.topics", dict(reversed(topics.items())))
    data.corpus.cache_clear()
    assert data.corpus() == text


def test_pairs_are_neighbouring_paragraphs_of_one_topic() -> None:
    first, second = data.text_pair_batches(WordTokenizer(), rows=4, length=32, count=2)
    assert first["input_ids"].shape == second["attention_mask"].shape == (4, 32)
    again = data.text_pair_batches(WordTokenizer(), rows=4, length=32, count=2)
    assert torch.equal(second["input_ids"], again[1]["input_ids"])
    topic = data.paragraphs()[0]
    expected = WordTokenizer()([topic[0], topic[1]], max_length=32)["input_ids"]
    assert torch.equal(first["input_ids"][[0, 2]], expected)


def test_asking_for_too_much_is_an_error() -> None:
    with pytest.raises(ValueError, match="the text has"):
        data.causal_lm_batches(BYTES, rows=1000, length=1000, count=1)
    with pytest.raises(ValueError, match="pairs asked"):
        data.text_pair_batches(WordTokenizer(), rows=100_000, length=8, count=1)


def test_classified_text_has_both_labels_and_comes_from_both_halves() -> None:
    (batch,) = data.classified_text_batches(BYTES, rows=4, length=16, count=1)
    assert batch["labels"].tolist() == [0, 1, 0, 1]
    text = data.corpus()
    assert bytes(batch["input_ids"][1].tolist()).decode() == text[len(text) // 2 :][16:32]


def test_smiles_are_tokenised_by_the_longest_match() -> None:
    tokenizer = data.SmilesTokenizer(["[UNK]", "C", "Cl", "l", "(", ")"])
    assert tokenizer.encode("CCl(x)", add_special_tokens=False) == [1, 2, 4, 0, 5]


def test_masked_smiles_label_only_what_is_masked() -> None:
    vocabulary = ["[PAD]", "[UNK]", "[MASK]", *"CNOcno()=123456.#"]
    a, b = (data.masked_smiles_batches(vocabulary, rows=8, length=64, count=1)[0] for _ in range(2))
    assert torch.equal(a["input_ids"], b["input_ids"])
    masked = a["input_ids"] == 2
    assert torch.equal(masked, a["labels"] != -100)
    assert 0.08 < masked.float().mean() < 0.22


def test_digits_are_images_in_range_with_ten_classes() -> None:
    pytest.importorskip("sklearn")
    a, b = data.digit_batches(rows=16, size=32, count=2)
    assert a["pixel_values"].shape == (16, 3, 32, 32)
    assert a["pixel_values"].min() >= -1
    assert a["pixel_values"].max() <= 1
    assert set(torch.cat([a["labels"], b["labels"]]).tolist()) == set(range(10))
    assert torch.equal(data.digit_batches(rows=16, size=32, count=1)[0]["pixel_values"], a["pixel_values"])


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(INSTALL, "no_such_package", "pip install this")
    for ask in (require, folder):
        with pytest.raises(MissingPackageError, match=r"'no_such_package'.*pip install this"):
            ask("no_such_package")
