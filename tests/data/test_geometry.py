import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sphinx_pl.data.geometry import (
    COCO_KEYPOINTS,
    Geometry,
    Grounded,
    iou,
    padded_frame,
    point_to_pixels,
    seen_views,
    to_pixels,
    to_square,
)
from sphinx_pl.data.images import PAD_COLOUR, padded_resize
from sphinx_pl.errors import UserError

G = Geometry()


def test_padded_frame_puts_the_odd_pixel_on_the_far_side():
    assert padded_frame((640, 480)) == (640, 0, 80)
    assert padded_frame((101, 200)) == (200, 49, 0)
    assert padded_frame((7, 7)) == (7, 0, 0)


def test_box_worked_by_hand():
    # 640x480 in a square of 640, moved down by 80: 64/640, (40+80)/640 = 0.1875, 320/640, (400+80)/640
    assert G.box((64, 40, 320, 400), (640, 480)) == "[0.100,0.188,0.500,0.750]"
    assert Geometry(1).box((64, 40, 320, 400), (640, 480)) == "[0.1,0.2,0.5,0.8]"
    assert Geometry(4).box((64, 40, 320, 400), (640, 480)) == "[0.1000,0.1875,0.5000,0.7500]"


def test_several_boxes_points_and_phrases_worked_by_hand():
    size = (100, 50)  # moved down by 25
    assert G.boxes([(0, 0, 100, 50), (10, 5, 20, 15)], size) == "[0.000,0.250,1.000,0.750;0.100,0.300,0.200,0.400]"
    assert G.point((50, 25), size) == "[0.500,0.500]"
    assert G.points([(50, 25), (0, 0)], size) == "[0.500,0.500;0.000,0.250]"
    assert G.grounded("a red square", [(10, 5, 20, 15)], size) == "<p>a red square</p>[0.100,0.300,0.200,0.400]"


def test_keypoints_follow_cocos_order_and_leave_absent_ones_out():
    keypoints = [(0.0, 0.0, 0)] * 17
    keypoints[0] = (50.0, 25.0, 2)
    keypoints[5] = (10.0, 10.0, 1)
    keypoints[16] = (90.0, 90.0, 2)
    expected = "<p>nose</p>[0.500,0.250]<p>left shoulder</p>[0.100,0.100]<p>right ankle</p>[0.900,0.900]"
    assert G.keypoints(keypoints, (100, 100)) == expected
    assert len(COCO_KEYPOINTS) == 17


def test_halves_round_up_on_the_decimal_number():
    # 0.0005, 0.0015, 0.0025: rounding half to even would write 0.000 and 0.002 for the first and the last
    assert [G.point((x, 0), (2000, 2000)) for x in (1, 3, 5)] == ["[0.001,0.000]", "[0.002,0.000]", "[0.003,0.000]"]
    # 1.15 is below its decimal value as a float: 0.115 has to become 0.12 all the same
    assert Geometry(2).point((1.15, 0), (10, 10)) == "[0.12,0.00]"


def test_text_to_numbers_to_text_is_unchanged_for_any_size_and_decimals():
    rng = random.Random(0)
    for _ in range(4000):
        decimals = rng.randint(1, 4)
        geometry = Geometry(decimals)
        size = rng.choice([(rng.randint(1, 9000), rng.randint(1, 9000)), (rng.randint(1, 90), rng.randint(1, 90))])
        xs, ys = (sorted(rng.randint(0, 10**decimals) for _ in range(2)) for _ in range(2))
        numbers = [f"{value / 10**decimals:.{decimals}f}" for value in (xs[0], ys[0], xs[1], ys[1])]
        text = f"[{','.join(numbers)}]"
        (box,) = geometry.parse_boxes(text)
        assert geometry.box(to_pixels(box, size), size) == text
        point_text = f"[{numbers[0]},{numbers[1]}]"
        (point,) = geometry.parse_points(point_text)
        assert geometry.point(point_to_pixels(point, size), size) == point_text


def test_written_boxes_are_within_half_a_unit_of_the_pixels():
    rng = random.Random(1)
    for _ in range(2000):
        decimals = rng.randint(1, 4)
        size = (rng.randint(1, 5000), rng.randint(1, 5000))
        xs, ys = (sorted(rng.uniform(0, limit) for _ in range(2)) for limit in size)
        box = (xs[0], ys[0], xs[1], ys[1])
        (read,) = Geometry(decimals).parse_boxes(Geometry(decimals).box(box, size))
        exact = to_square(box, size)
        assert max(abs(a - b) for a, b in zip(read, exact, strict=True)) <= 0.5 * 10**-decimals + 1e-12


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("It is [ 0.1, 0.2 ,.3,1 ] there", [(0.1, 0.2, 0.3, 1.0)]),
        ("[0.9,0.8,0.1,0.2]", [(0.1, 0.2, 0.9, 0.8)]),  # swapped corners
        ("[0.1,0.2,0.3,0.4;0.5,0.6,0.7,0.8]", [(0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8)]),
        ("[0.1,0.2,0.3,0.4;0.5,0.6,0.7]", [(0.1, 0.2, 0.3, 0.4)]),  # three numbers
        ("[0.1,0.2,0.3,0.4;0.5,0.6,0.7,0.", [(0.1, 0.2, 0.3, 0.4)]),  # generation stopped inside the second
        ("[0.1,0.2,0.3,0.4", []),  # the last number may go on
        ("[0.1 [0.1,0.2,0.3,0.4]", [(0.1, 0.2, 0.3, 0.4)]),
        ("[12,40,50,80]", []),  # pixels are not in the grammar
        ("[-0.1,0.2,0.3,0.4]", []),
        ("[nan,inf,1e-1,0x1]", []),
        ("[٠.١,0.2,0.3,0.4]", []),  # digits of other scripts
        ("[,,,] [;;] [] ]] [[ [0.1;0.2]", []),
        ("", []),
    ],
)
def test_parse_boxes_takes_what_is_well_formed(text, boxes):
    assert G.parse_boxes(text) == boxes


def test_parse_points_and_boxes_do_not_mix():
    text = "[0.1,0.2;0.1,0.2,0.3,0.4] and [0.5,0.6]"
    assert G.parse_points(text) == [(0.1, 0.2), (0.5, 0.6)]
    assert G.parse_boxes(text) == [(0.1, 0.2, 0.3, 0.4)]


def test_parse_grounded():
    text = (
        "A <p>red square</p>[0.1,0.2,0.3,0.4] by <p>two dots</p> [0.5,0.6;0.7,0.8], <p>a cat</p> <p>lost <p>x</p>[1,1]"
    )
    assert G.parse_grounded(text) == [
        Grounded("red square", boxes=((0.1, 0.2, 0.3, 0.4),)),
        Grounded("two dots", points=((0.5, 0.6), (0.7, 0.8))),
        Grounded("x", points=((1.0, 1.0),)),
    ]


def test_parsing_never_raises():
    rng = random.Random(2)
    pieces = ["[", "]", ";", ",", "0.5", ".", "1", " ", "<p>", "</p>", "a", "-", "0.1,0.2,0.3,0.4", "\n", "é"]
    for _ in range(5000):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 40)))
        for box in G.parse_boxes(text):
            assert 0 <= box[0] <= box[2] <= 1
            assert 0 <= box[1] <= box[3] <= 1
        G.parse_points(text)
        G.parse_grounded(text)


def test_pieces_join_to_the_text_and_name_what_parsing_finds():
    text = "A <p>dog</p> [0.1,0.2,0.3,0.4; 0.5,0.5,0.6,0.6] at [0.5,0.5], <p>cat</p>[no] [0.1,0.2,0.3,0.4;0.5"
    pieces = G.pieces(text)
    assert "".join(piece.text for piece in pieces) == text
    named = [piece for piece in pieces if piece.numbers]
    assert [piece.phrase for piece in named] == ["dog", "", ""]
    assert [piece.numbers for piece in named] == [
        "[0.1,0.2,0.3,0.4; 0.5,0.5,0.6,0.6]",
        "[0.5,0.5]",
        "[0.1,0.2,0.3,0.4;0.5",
    ]
    assert [box for piece in named for box in piece.boxes] == G.parse_boxes(text)
    assert [point for piece in named for point in piece.points] == G.parse_points(text)
    draw = random.Random(0)
    for _ in range(500):
        text = "".join(draw.choice(["<p>", "</p>", "[", "]", ",", ";", "0.1", "a ", "0.5,0.5"]) for _ in range(20))
        assert "".join(piece.text for piece in G.pieces(text)) == text
    assert G.pieces("") == []


def test_iou():
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert iou((0, 0, 1, 1), (0, 0, 1, 1)) == 1
    assert iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    assert iou((1, 1, 1, 1), (1, 1, 1, 1)) == 0  # both empty


def test_decimals_are_bounded():
    with pytest.raises(UserError, match="decimals=0"):
        Geometry(0)


def test_views_that_show_only_padding() -> None:
    wide = (True, False, False, False, True, True, True, False, False, False)
    assert seen_views((900, 100), 672, 3) == wide
    assert seen_views((100, 900), 672, 3) == (True, *([False, True, False] * 3))
    assert seen_views((900, 300), 672, 3) == (True,) * 10  # resizing carries its edge over the seam
    assert seen_views((900, 100), 448, 2) == (True,) * 5


@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([2, 3, 4]))
def test_skipped_views_are_of_the_padding_colour(width: int, height: int, grid: int) -> None:
    image = Image.new("RGB", (width, height), (255, 0, 90))
    pixels = np.asarray(padded_resize(image, 12 * grid)).reshape(grid, 12, grid, 12, 3)
    crops = pixels.transpose(0, 2, 1, 3, 4).reshape(grid**2, -1, 3)
    for crop, seen in zip(crops, seen_views((width, height), 12 * grid, grid)[1:], strict=True):
        assert seen or (crop == PAD_COLOUR).all()
