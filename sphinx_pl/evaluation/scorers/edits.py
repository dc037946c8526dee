"""The edit distance of two texts in characters, and their similarity."""

from __future__ import annotations


def edit_distance(a: str, b: str) -> int:
    """The fewest insertions, deletions and replacements of characters that turn `a` into `b`.

    A column of the table is two numbers whose bits are its steps up and down (Myers 1999; Hyyrö
    2003). So it takes as many steps as `b` has characters instead of the product; constant answers
    are tried on thousands of records.
    """
    if not a:
        return len(b)
    places: dict[str, int] = {}
    for i, character in enumerate(a):
        places[character] = places.get(character, 0) | 1 << i
    whole, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    up, down, distance = whole, 0, len(a)
    for character in b:
        match = places.get(character, 0)
        diagonal = (((match & up) + up) ^ up) | match | down
        right_up, right_down = down | ~(diagonal | up), up & diagonal
        distance += bool(right_up & last) - bool(right_down & last)
        right_up, right_down = right_up << 1 | 1, right_down << 1
        up = (right_down | ~(diagonal | right_up)) & whole
        down = right_up & diagonal & whole
    return distance


def similarity(a: str, b: str) -> float:
    """1 minus the edit distance over the longer text's length; 1 where both are empty."""
    longer = max(len(a), len(b))
    return 1 - edit_distance(a, b) / longer if longer else 1.0
