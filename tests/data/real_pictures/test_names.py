"""Names of objects in descriptions, titles and file names."""

from __future__ import annotations

import pytest

from sphinx_pl.data.real_pictures.names import name_in_sentence, name_in_title, singular


@pytest.mark.parametrize(
    ("text", "name", "noun", "phrase"),
    [
        ("A great blue heron.", "great blue heron", "heron", "a great blue heron"),
        ("An “Fuji” apple.", "fuji apple", "apple", "a fuji apple"),
        ("A pair of cherries.", "cherries", "cherry", "cherries"),
        ("A peacock (a male peafowl).", "peacock", "peacock", "a peacock"),
        ("A hoverfly resembles a honeybee drone.", "hoverfly", "hoverfly", "a hoverfly"),
        ("An owl.", "owl", "owl", "an owl"),
    ],
)
def test_a_description_names_what_follows_its_article(text: str, name: str, noun: str, phrase: str) -> None:
    found = name_in_sentence(text)
    assert found is not None
    assert (found.text, found.noun, found.phrase) == (name, noun, phrase)


@pytest.mark.parametrize("text", ["Eat your broccoli!", "Fire!", "A", "", "A b.", f"A {'very ' * 9}big cat."])
def test_other_sentences_name_nothing(text: str) -> None:
    assert name_in_sentence(text) is None


def test_a_title_has_english_words_only_and_no_numbers() -> None:
    words = frozenset(("candle", "red", "apple", "tuba"))
    assert [found and found.text for found in (name_in_title(title, words) for title in ("candle_02", "redApple"))] == [
        "candle",
        "red apple",
    ]
    found = name_in_title("Tuba - illustration", words)
    assert found is not None
    assert found.text == "tuba"
    assert name_in_title("gatto", words) is None
    assert name_in_title("", words) is None


def test_plurals_are_folded() -> None:
    pairs = {"cats": "cat", "boxes": "box", "cherries": "cherry", "glass": "glass", "bus": "bus", "tomatoes": "tomato"}
    assert {plural: singular(plural) for plural in pairs} == pairs
