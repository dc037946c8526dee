"""Text -> `Parsed`: one function for each form of answer. They take any text and never raise."""

from __future__ import annotations

from sphinx_pl.data.answer_parsing import normalise, read_letter, read_yes_or_no
from sphinx_pl.data.coordinates import Coordinates, Grounded
from sphinx_pl.data.tasks.task import Parsed


def read_text(text: str, coordinates: Coordinates) -> Parsed:
    """The text as it is."""
    return Parsed(text)


def read_yes_no(text: str, coordinates: Coordinates) -> Parsed:
    """ "yes" or "no" if the text begins with that word, in any case, and does not say the other one
    too."""
    yes = read_yes_or_no(text)
    return Parsed(formed=False) if yes is None else Parsed("yes" if yes else "no")


def read_choice(text: str, coordinates: Coordinates) -> Parsed:
    """The letter that the text begins with, if it names no other: "B", "b", "(B)", "B. text";
    "Blue" is no letter."""
    letter = read_letter(text)
    return Parsed(letter) if letter else Parsed(formed=False)


def read_boxes(text: str, coordinates: Coordinates) -> Parsed:
    """All boxes, as one place without a label."""
    boxes = tuple(coordinates.parse_boxes(text))
    return Parsed(places=(Grounded("", boxes),)) if boxes else Parsed(formed=False)


def read_detection(text: str, coordinates: Coordinates) -> Parsed:
    """All boxes, or none if the text says "None"."""
    return Parsed() if normalise(text) == "none" else read_boxes(text, coordinates)


def read_grounded(text: str, coordinates: Coordinates) -> Parsed:
    """All phrases with their boxes."""
    places = tuple(coordinates.parse_grounded(text))
    return Parsed(places=places, formed=any(place.boxes for place in places))


def read_ocr(text: str, coordinates: Coordinates) -> Parsed:
    """All phrases with a place, a box or a point: only the text counts."""
    places = tuple(coordinates.parse_grounded(text))
    return Parsed(places=places, formed=bool(places))


def read_keypoints(text: str, coordinates: Coordinates) -> Parsed:
    """All phrases with their points."""
    places = tuple(coordinates.parse_grounded(text))
    return Parsed(places=places, formed=any(place.points for place in places))


def read_lines(text: str, coordinates: Coordinates) -> Parsed:
    """A label without a place for each line that is not blank."""
    places = tuple(Grounded(line.strip()) for line in text.splitlines() if line.strip())
    return Parsed(places=places, formed=bool(places))


def read_grounded_answer(text: str, coordinates: Coordinates) -> Parsed:
    """All phrases with their boxes, and the text with a placeholder for each phrase: `{0}`, or
    `{1,2}` for two boxes."""
    answer, places, count = "", [], 0
    for part in coordinates.cut_grounded(text):
        if isinstance(part, str):
            answer += part
            continue
        places.append(part)
        numbers = ",".join(str(count + i) for i in range(len(part.boxes)))
        answer += f"{{{numbers}}}" if numbers else part.phrase
        count += len(part.boxes)
    return Parsed(answer, tuple(places), formed=count > 0)
