"""Real English from Python's documentation: paragraphs, and questions with answers.

The sources are reStructuredText. Paragraphs of prose become documents. Entries of the glossary and
of the FAQ become questions and answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from sphinx_pl.data.real_pictures.packages import FetchedPackage
from sphinx_pl.data.real_pictures.pictures import share_of

FEWEST_WORDS = 25
"""Shorter paragraphs are captions of code and lists, rarely prose."""
LONGEST = 900
"""Characters of a document, which ends with a sentence."""
LONGEST_ANSWER = 320
VAL_SHARE = 0.04

_ROLE = re.compile(r":[a-zA-Z:+]+:`!?~?([^`<]*?)(?:\s*<[^`>]*>)?`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]+>`__?")
_MARKUP = re.compile(r"``([^`]+)``|`([^`]+)`_?|\*\*([^*\n]+)\*\*|(?<![\w*])\*([^*\n]+)\*(?![\w*])")
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"(])")
_UNDERLINE = re.compile(r"([-=~^\"*+#])\1{2,}\s*")
# Lines that begin a directive, a comment, a list, a table or a heading's underline.
_NO_PROSE = re.compile(r"(\.\.|[-*+•|#>]|\d+[.)]|[+=-]{3}|:[a-z]+:)(\s|$|[+=-])")


@dataclass(frozen=True)
class QuestionAnswer:
    """A question with its answer, both of plain text."""

    key: str
    question: str
    answer: str


def plain_text(text: str) -> str:
    """Return reStructuredText of one paragraph without its markup, on one line."""
    text = _LINK.sub(r"\1", _ROLE.sub(r"\1", text))
    text = _MARKUP.sub(lambda match: next(group for group in match.groups() if group is not None), text)
    return " ".join(text.replace("\\", "").split())


def documents(package: FetchedPackage) -> Iterator[tuple[str, str]]:
    """Yield (key, text) of stretches of prose; paragraphs that follow each other are joined."""
    for path, source in _sources(package):
        if "/whatsnew/changelog" in path:
            continue
        stretch: list[str] = []
        for number, paragraph in enumerate([*_paragraphs(source), ""]):
            if stretch and (not paragraph or len(" ".join([*stretch, paragraph])) > LONGEST):
                if len(" ".join(stretch).split()) >= FEWEST_WORDS:
                    yield f"{path}:{number}", shortened(" ".join(stretch), LONGEST)
                stretch = []
            if paragraph:
                stretch.append(paragraph)


def _sources(package: FetchedPackage) -> Iterator[tuple[str, str]]:
    for path in package.paths(".rst.txt"):
        try:
            yield path.partition("/_sources/")[2], (package.folder / path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue


def _paragraphs(source: str) -> Iterator[str]:
    """Yield the paragraphs of prose, and "" for everything between them."""
    for block in re.split(r"\n\s*\n", source):
        lines = block.strip("\n").splitlines()
        prose = lines and not any(line[:1].isspace() or _NO_PROSE.match(line) for line in lines)
        if not prose or any(_UNDERLINE.fullmatch(line) for line in lines):
            yield ""
        elif lines[-1].rstrip().endswith("::"):
            yield plain_text(block).removesuffix("::").rstrip() + "."
        else:
            text = plain_text(block)
            yield text if text[:1].isupper() and text.endswith((".", "!", "?", ":")) else ""


def shortened(text: str, longest: int) -> str:
    """Return the first sentences of a text that have at most `longest` characters together.

    It is "" if already the first one is longer.
    """
    kept = ""
    for sentence in _SENTENCE.split(text):
        if len(kept) + len(sentence) + 1 > longest:
            break
        kept = f"{kept} {sentence}".strip()
    return kept


def questions(package: FetchedPackage) -> Iterator[QuestionAnswer]:
    """Yield the questions that the FAQ asks, and one for each entry of the glossary."""
    for path, source in _sources(package):
        if path.startswith("faq/"):
            yield from _faq(path, source)
        elif path == "glossary.rst.txt":
            yield from _glossary(path, source)


def _faq(path: str, source: str) -> Iterator[QuestionAnswer]:
    lines = source.splitlines()
    for number in range(len(lines) - 1):
        question = plain_text(lines[number])
        if not question.endswith("?") or not _UNDERLINE.fullmatch(lines[number + 1] or " "):
            continue
        answer = next((text for text in _paragraphs("\n".join(lines[number + 2 :]).lstrip("\n"))), "")
        if (answer := shortened(answer, LONGEST_ANSWER)) and not answer.endswith(":"):
            yield QuestionAnswer(f"{path}:{number}", question, answer)


def _glossary(path: str, source: str) -> Iterator[QuestionAnswer]:
    for match in re.finditer(r"^ {3}(\w[^\n`]*)\n((?: {6}[^\n]+\n)+)", source, re.MULTILINE):
        term, answer = plain_text(match[1]), shortened(plain_text(match[2]), LONGEST_ANSWER)
        if answer[:1].isupper() and answer.endswith("."):
            yield QuestionAnswer(f"{path}:{term}", f'What does "{term}" mean in Python?', answer)


def is_held_out(key: str) -> bool:
    """Return whether a document or a question is for validation."""
    return share_of(f"text {key}") < VAL_SHARE
