"""CIDEr-D of tokens against aac-metrics, which has an implementation of its own; the tokenizer's Java in long tests."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest

from sphinx_pl.evaluation.scorers.caption import _tokenized as tokenized
from sphinx_pl.evaluation.scorers.caption import caption_scores, check_caption_tools, cider_of_tokens
from sphinx_pl.utils.errors import UserError

CAPTIONS = {"1": "A dog, running on the beach.", "2": "Two red cars!", "3": ""}
REFERENCES = {
    "1": ["a dog running on the beach", "The dog's on a beach."],
    "2": ["two red cars", "Cars (red)."],
    "3": ["a cat", "cat\u2028on a mat\r\n"],
}


def test_cider_of_tokens_is_that_of_aac_metrics(golden: dict[str, list[Any]]) -> None:
    assert len(golden["cider"]) == 100
    for captions, references, theirs in golden["cider"]:
        keys = [str(i) for i in range(len(captions))]
        ours = cider_of_tokens(dict(zip(keys, captions, strict=True)), dict(zip(keys, references, strict=True)))
        assert ours == pytest.approx(theirs, abs=1e-6)


def test_of_a_single_image_cider_is_nothing() -> None:
    assert cider_of_tokens({"1": "a dog"}, {"1": ["a dog"]}) == 0  # log of 1 image is 0
    two = {"1": ["a dog runs here"], "2": ["the red cat sits"]}
    assert cider_of_tokens({"1": "a dog runs here", "2": "the red cat sits"}, two) == pytest.approx(10)


@pytest.mark.parametrize(
    ("captions", "references", "message"),
    [
        ({"1": "x"}, {"1": ["x"], "2": ["y"]}, "1 differ, such as '2'"),
        ({"1": "x", "3": "z"}, {"1": ["x"], "2": ["y"]}, "2 differ, such as '2'"),
        ({}, {}, "no captions"),
        ({"1": "x"}, {"1": []}, "image '1' has no reference"),
    ],
)
def test_images_must_match(captions: dict[str, str], references: dict[str, list[str]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cider_of_tokens(captions, references)


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        with pytest.raises(UserError, match="default-jre-headless"):
            check_caption_tools()
        with pytest.raises(UserError, match="default-jre-headless"):
            caption_scores(CAPTIONS, REFERENCES)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"pip install 'sphinx-pl\[eval\]'"):
            check_caption_tools()
        with pytest.raises(UserError, match=r"pip install 'sphinx-pl\[eval\]'"):
            cider_of_tokens(CAPTIONS, REFERENCES)


def stub(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A `java` that does what the script says."""
    file = folder / "java"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_a_tokenizer_that_fails_is_no_empty_caption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(tmp_path, monkeypatch, "echo Loading >&2; echo 'Error: no memory' >&2; exit 1")
    with pytest.raises(UserError, match=r"tokenizer of captions failed \(exit code 1\): Error: no memory$"):
        caption_scores(CAPTIONS, REFERENCES)
    stub(tmp_path, monkeypatch, "echo 'a dog'")  # one line of three
    with pytest.raises(UserError, match=r"exit code 0\): it printed nothing"):
        caption_scores(CAPTIONS, REFERENCES)


def test_a_meteor_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(tmp_path, monkeypatch, 'case "$*" in *meteor*) echo "Error: heap" >&2; exit 1;; *) exec cat;; esac')
    with pytest.raises(UserError, match=r"METEOR failed \(it takes 2 GB of memory\): Error: heap"):
        caption_scores(CAPTIONS, REFERENCES)


@pytest.mark.long
def test_the_tokens_are_those_of_pycocoevalcap() -> None:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    draw = random.Random(0)
    words = [
        "Dog",
        "it's",
        "can't",
        "(red)",
        "U.S.",
        "3.5",
        "café",
        "—",
        "“so”",
        "e-mail",
        "...",
        "and/or",
        "汉字",
        "``",
    ]
    texts = {
        str(i): [" ".join(draw.choices(words, k=draw.randint(0, 9))) for _ in range(i % 3 + 1)] for i in range(300)
    }
    texts["last"] = [""]
    lines = {key: [{"caption": text} for text in group] for key, group in texts.items()}
    assert tokenized(texts) == PTBTokenizer().tokenize(lines)


@pytest.mark.long
def test_with_javas_tokenizer(capfd: pytest.CaptureFixture[str]) -> None:
    """Fails where Java is missing: it is what captions are scored with."""
    figures = caption_scores(CAPTIONS, REFERENCES)
    assert capfd.readouterr() == ("", "")  # nothing into the user's terminal
    # Worked by hand: small letters, no punctuation, "'s" a token of its own, an empty caption stays an empty one;
    # brackets stay as what the tokenizer calls them, since it makes that small before they are looked for.
    captions = {"1": "a dog running on the beach", "2": "two red cars", "3": ""}
    references = {
        "1": ["a dog running on the beach", "the dog 's on a beach"],
        "2": ["two red cars", "cars -lrb- red -rrb-"],
        "3": ["a cat", "cat on a mat"],
    }
    assert figures["CIDEr"] == pytest.approx(cider_of_tokens(captions, references))
    assert figures["CIDEr"] > 1
    assert figures["BLEU-1"] > figures["BLEU-4"] > 0.5
    assert 0.3 < figures["METEOR"] < 1
    assert figures["ROUGE-L"] == pytest.approx(2 / 3)  # two of three captions are a reference
