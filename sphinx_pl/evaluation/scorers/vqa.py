"""VQA accuracy: how many of ten people gave the answer (Antol et al. 2015), with the official
normalisation of answers.

Official: `vqaEval.py` of the VQA repository (VQAv2; OK-VQA and VizWiz use it as well) and, for
TextVQA, the evaluator of MMF (`EvalAIAnswerProcessor`, `TextVQAAccuracyEvaluator`). The two differ
in what is done to answers before they are compared:

- `vqaEval.py` normalises prediction and answers only where the answers are not all the same. Where
  all ten people wrote "yes", the prediction "Yes" is wrong there. These functions follow it, so
  clean up a prediction before. (LAVIS has an earlier version, which normalises every prediction,
  and only the punctuation of answers that differ.)
- TextVQA's normalises always, and before the rest it makes letters small, drops commas and question
  marks, and parts "'s" from its word. So "1,000 o'clock" stays one number in both, but "john's"
  becomes "john 's" in TextVQA's alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_PERSONS_AGREEING = 3

_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
_ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# The script's pattern begins with a look-behind that was mistyped and always holds, so a full stop
# goes wherever no digit follows it; and its flag re.UNICODE, which is 32, stands where the number
# of replacements belongs.
_FULL_STOP = re.compile(r"\.(?!\d)")
_FULL_STOPS_DROPPED = int(re.UNICODE)
_COMMA_IN_NUMBER = re.compile(r"\d,\d")

# What the table has besides cannot take effect: capitals (words are small by then) and words mapped
# to themselves.
_CONTRACTION_TABLE = """
    aint=ain't arent=aren't cant=can't couldve=could've couldnt=couldn't couldn'tve=couldn't've couldnt've=couldn't've
    didnt=didn't doesnt=doesn't dont=don't hadnt=hadn't hadnt've=hadn't've hadn'tve=hadn't've hasnt=hasn't
    havent=haven't hed=he'd hed've=he'd've he'dve=he'd've hes=he's howd=how'd howll=how'll hows=how's isnt=isn't
    itd=it'd itd've=it'd've it'dve=it'd've itll=it'll maam=ma'am mightnt=mightn't mightnt've=mightn't've
    mightn'tve=mightn't've mightve=might've mustnt=mustn't mustve=must've neednt=needn't notve=not've oclock=o'clock
    oughtnt=oughtn't ow's'at='ow's'at 'ows'at='ow's'at 'ow'sat='ow's'at shant=shan't shed've=she'd've
    she'dve=she'd've shouldve=should've shouldnt=shouldn't shouldnt've=shouldn't've shouldn'tve=shouldn't've
    somebody'd=somebodyd somebodyd've=somebody'd've somebody'dve=somebody'd've somebodyll=somebody'll
    somebodys=somebody's someoned=someone'd someoned've=someone'd've someone'dve=someone'd've someonell=someone'll
    someones=someone's somethingd=something'd somethingd've=something'd've something'dve=something'd've
    somethingll=something'll thats=that's thered=there'd thered've=there'd've there'dve=there'd've therere=there're
    theres=there's theyd=they'd theyd've=they'd've they'dve=they'd've theyll=they'll theyre=they're theyve=they've
    twas='twas wasnt=wasn't wed've=we'd've we'dve=we'd've weve=we've werent=weren't whatll=what'll whatre=what're
    whats=what's whatve=what've whens=when's whered=where'd wheres=where's whereve=where've whod=who'd whod've=who'd've
    who'dve=who'd've wholl=who'll whos=who's whove=who've whyll=why'll whyre=why're whys=why's wont=won't
    wouldve=would've wouldnt=wouldn't wouldnt've=wouldn't've wouldn'tve=wouldn't've yall=y'all yall'll=y'all'll
    y'allll=y'all'll yall'd've=y'all'd've y'alld've=y'all'd've y'all'dve=y'all'd've youd=you'd youd've=you'd've
    you'dve=you'd've youll=you'll youre=you're youve=you've
"""
_CONTRACTIONS = dict(pair.split("=") for pair in _CONTRACTION_TABLE.split())


def normalise_vqa(text: str) -> str:
    """An answer as `vqaEval.py` compares it (`processPunctuation`, then `processDigitArticle`).

    A punctuation mark goes if it touches a blank anywhere in the text, or if the text has a number
    like "1,000"; elsewhere a blank takes its place. Number words up to ten become digits ("none" is
    0), articles go, contractions get their apostrophes. Apostrophes and colons stay.
    """
    return _small_words(_without_punctuation(_one_line(text)))


def normalise_textvqa(text: str) -> str:
    """An answer as MMF's `EvalAIAnswerProcessor` compares it: see the module for what differs from
    `normalise_vqa`."""
    words = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalise_vqa(words)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The accuracy of VQAv2, OK-VQA and VizWiz, from 0 to 1: `vqaEval.py`; the module says what it
    compares.

    It is the mean, over all ways to leave one person out, of min(others who gave the predicted
    answer / 3, 1). VizWiz counts "unanswerable" as an answer like any other. The data sets have ten
    answers. With fewer than four, the scripts could give no answer full marks, so the score is
    min(others / (answers - 1), 1). With a single answer, it is whether that is the predicted one.

    Raises:
        ValueError: no answers.
    """
    text = _one_line(prediction)
    truth = [_one_line(answer) for answer in answers]
    if len(set(truth)) > 1:
        text, truth = normalise_vqa(text), [normalise_vqa(answer) for answer in truth]
    return _agreement(text, truth)


def textvqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The accuracy of TextVQA, from 0 to 1: MMF's `TextVQAAccuracyEvaluator`, which always
    normalises answers.

    That evaluator averages over the persons left out for each unique answer, and looks up the
    prediction. The result is that of `vqa_accuracy`, with the same rule for fewer than four
    answers.

    Raises:
        ValueError: no answers.
    """
    return _agreement(normalise_textvqa(prediction), [normalise_textvqa(answer) for answer in answers])


def _agreement(prediction: str, answers: Sequence[str]) -> float:
    if not answers:
        raise ValueError("accuracy needs at least one answer of a person")
    if len(answers) == 1:
        return float(prediction == answers[0])
    needed = min(_PERSONS_AGREEING, len(answers) - 1)
    matches = sum(answer == prediction for answer in answers)
    left_in, left_out = min(matches / needed, 1.0), min(max(matches - 1, 0) / needed, 1.0)
    return (matches * left_out + (len(answers) - matches) * left_in) / len(answers)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    in_number = _COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        dropped = in_number or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if dropped else " ")
    return _FULL_STOP.sub("", cleaned, count=_FULL_STOPS_DROPPED)


def _small_words(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
