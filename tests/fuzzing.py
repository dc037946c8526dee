"""Damage to files, for the tests that read them."""

from __future__ import annotations

import random


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One to four of: flipped bits, a cut, noise put in, a part doubled, a part lost, another number or word."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) or 1)
        end = at + rng.choice((1, 8, 64, 600))
        kind = rng.randrange(6)
        if kind == 0:
            spots = {rng.randrange(len(data) or 1): rng.randrange(256) for _ in range(rng.choice((1, 4, 40)))}
            data = bytes(spots.get(i, byte) for i, byte in enumerate(data))
        elif kind == 1:
            data = data[:at]
        elif kind == 2:
            data = data[:at] + rng.randbytes(end - at) + data[at:]
        elif kind == 3:
            data = data[:end] + data[at:]
        elif kind == 4:
            data = data[:at] + data[end:]
        else:
            old, new = rng.choice(WORDS), rng.choice(WORDS)
            data = data.replace(old, new, rng.randint(1, 3))
    return data


# What our formats are made of, and values that code likes to trip over.
WORDS = tuple(
    word.encode()
    for word in (
        *('"task"', '"box"', '"image"', '"regions"', '"conversations"', '"value"', '"from"', '"label"', '"keypoints"'),
        *(
            '"width"',
            '"height"',
            '"question"',
            '"answer"',
            '"caption"',
            '"text"',
            '"choices"',
            "null",
            "{}",
            "[]",
            '""',
        ),
        *("64", "-1", "0", "1e999", "NaN", "99999999999999999999", "true", "<image>", "###", "[", "]", "{", "}", ","),
    )
)
