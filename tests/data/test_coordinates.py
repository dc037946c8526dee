import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sphinx_pl.data.coordinates import (
    COCO_KEYPOINTS,
    Coordinates,
    Grounded,
    iou,
    kept_views,
    padded_frame,
    point_to_pixels,
    to_pixels,
)
from sphinx_pl.data.images import PAD_COLOUR, padded_resize, to_tensor
from sphinx_pl.models.views import split_views
from sphinx_pl.utils.errors import UserError

G = Coordinates()


def test_padded_frame_puts_the_odd_pixel_on_the_far_side():
    assert padded_frame((640, 480)) == (640, 0, 80)
    assert padded_frame((101, 200)) == (200, 49, 0)
    assert padded_frame((7, 7)) == (7, 0, 0)


def test_box_worked_by_hand():
    # 640x480 in a square of 640, moved down by 80: 64/640, (40+80)/640 = 0.1875, 320/640, (400+80)/640
    assert G.box((64, 40, 320, 400), (640, 480)) == "[0.100,0.188,0.500,0.750]"
    assert Coordinates(1).box((64, 40, 320, 400), (640, 480)) == "[0.1,0.2,0.5,0.8]"
    assert Coordinates(4).box((64, 40, 320, 400), (640, 480)) == "[0.1000,0.1875,0.5000,0.7500]"


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
    assert Coordinates(2).point((1.15, 0), (10, 10)) == "[0.12,0.00]"


def test_text_to_numbers_to_text_is_unchanged_for_any_size_and_decimals():
    rng = random.Random(0)
    for _ in range(4000):
        decimals = rng.randint(1, 4)
        coordinates = Coordinates(decimals)
        size = rng.choice([(rng.randint(1, 9000), rng.randint(1, 9000)), (rng.randint(1, 90), rng.randint(1, 90))])
        xs, ys = (sorted(rng.randint(0, 10**decimals) for _ in range(2)) for _ in range(2))
        numbers = [f"{value / 10**decimals:.{decimals}f}" for value in (xs[0], ys[0], xs[1], ys[1])]
        text = f"[{','.join(numbers)}]"
        (box,) = coordinates.parse_boxes(text)
        assert coordinates.box(to_pixels(box, size), size) == text
        point_text = f"[{numbers[0]},{numbers[1]}]"
        (point,) = coordinates.parse_points(point_text)
        assert coordinates.point(point_to_pixels(point, size), size) == point_text


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
        ("[0.1,-0.003,1.004,0.9]", [(0.1, 0.0, 1.0, 0.9)]),  # a little beyond the edge: moved to it
        ("[-0.1,0.2,1.1,0.4]", [(0.0, 0.2, 1.0, 0.4)]),
        ("[-0.11,0.2,0.3,0.4] [0.1,0.2,1.11,0.4] [--0.1,0.2,0.3,0.4]", []),
        ("[1.04,-0.02,0.5,0.4]", [(0.5, 0.0, 1.0, 0.4)]),  # and swapped
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
    assert G.parse_points("[-0.02,1.03] and [3,4]") == [(0.0, 1.0)]


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
    pieces = ["[", "]", ";", ",", "0.5", ".", "1", " ", "<p>", "</p>", "a", "-", "1.05", "0.1,0.2,0.3,0.4", "\n", "é"]
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
        Coordinates(0)


def test_views_that_show_only_padding() -> None:
    wide = (True, False, False, False, True, True, True, False, False, False)
    assert kept_views((900, 100), 672, 3) == wide
    assert kept_views((100, 900), 672, 3) == (True, *([False, True, False] * 3))
    assert kept_views((900, 300), 672, 3) == (True,) * 10  # resizing carries its edge over the seam
    assert kept_views((900, 100), 448, 2) == (True,) * 5


@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([2, 3, 4]))
def test_skipped_views_are_of_the_padding_colour(width: int, height: int, grid: int) -> None:
    image = Image.new("RGB", (width, height), (255, 0, 90))
    pixels = np.asarray(padded_resize(image, 12 * grid)).reshape(grid, 12, grid, 12, 3)
    crops = pixels.transpose(0, 2, 1, 3, 4).reshape(grid**2, -1, 3)
    for crop, is_kept in zip(crops, kept_views((width, height), 12 * grid, grid)[1:], strict=True):
        assert is_kept or (crop == PAD_COLOUR).all()


# --- Round trips on 10,000 random geometries


def random_geometries(seed, count=10_000):
    """(writer, image size, box, points, keypoints): places of every kind anywhere in the image, edges included."""
    rng = random.Random(seed)

    def value(limit):
        return rng.choice([0.0, float(limit), float(rng.randint(0, limit)), rng.uniform(0, limit)])

    for _ in range(count):
        size = width, height = (rng.randint(1, 4000), rng.randint(1, 4000))
        (x1, x2), (y1, y2) = sorted((value(width), value(width))), sorted((value(height), value(height)))
        points = [(value(width), value(height)) for _ in range(rng.randint(1, 4))]
        keypoints = [(value(width), value(height), rng.randint(0, 2)) for _ in COCO_KEYPOINTS]
        yield Coordinates(rng.randint(1, 6)), size, (x1, y1, x2, y2), points, keypoints


def test_round_trips_from_text_and_from_pixels():
    for coordinates, size, box, points, keypoints in random_geometries(0):
        # As exact as the text can be: half a unit of the last decimal, in pixels of the image.
        reach = 0.5 * 10**-coordinates.decimals * max(size) * (1 + 1e-9)

        text = coordinates.box(box, size)
        (read,) = coordinates.parse_boxes(text)
        back = to_pixels(read, size)
        assert coordinates.box(back, size) == text
        assert max(abs(a - b) for a, b in zip(back, box, strict=True)) <= reach

        text = coordinates.points(points, size)
        pixels = [point_to_pixels(point, size) for point in coordinates.parse_points(text)]
        assert coordinates.points(pixels, size) == text
        assert max(math.dist(a, b) for a, b in zip(pixels, points, strict=True)) <= math.sqrt(2) * reach

        text = coordinates.keypoints(keypoints, size)
        values = {item.phrase: point_to_pixels(item.points[0], size) for item in coordinates.parse_grounded(text)}
        assert set(values) == {name for name, (_, _, v) in zip(COCO_KEYPOINTS, keypoints, strict=True) if v}
        named = [(*values[name], 1) if name in values else (0.0, 0.0, 0) for name in COCO_KEYPOINTS]
        assert coordinates.keypoints(named, size) == text
        for (x, y, v), (true_x, true_y, _) in zip(named, keypoints, strict=True):
            assert not v or max(abs(x - true_x), abs(y - true_y)) <= reach


@pytest.mark.parametrize("grid", [1, 2, 3])
def test_the_views_see_a_box_where_its_text_says(grid):
    # Every pixel of the square holds its own position, so a view tells what part of the square each of its pixels is.
    pixels = 32
    side = grid * pixels
    places = (torch.arange(side) + 0.5) / side
    square = torch.stack([places.expand(side, side), places[:, None].expand(side, side), torch.zeros(side, side)])
    views = split_views(square[None], pixels, grid)[0, 1:] if grid > 1 else square[None]
    for coordinates, size, box, _, _ in random_geometries(grid, 10_000 // 3):
        text = coordinates.box(box, size)
        (read,) = coordinates.parse_boxes(text)
        corners = []
        for x, y in (read[:2], read[2:]):
            column, row = (min(int(value * grid), grid - 1) for value in (x, y))
            inside = [value * side - offset * pixels for value, offset in ((x, column), (y, row))]  # of that view
            colour = views[row * grid + column, :2, min(int(inside[1]), pixels - 1), min(int(inside[0]), pixels - 1)]
            assert (colour - torch.tensor([x, y])).abs().max() <= 0.5 / side + 1e-6
            corners += [(inside[0] + column * pixels) / side, (inside[1] + row * pixels) / side]
        assert coordinates.box(to_pixels(tuple(corners), size), size) == text


@pytest.mark.parametrize("grid", [1, 2, 3])
def test_a_drawn_box_appears_in_the_views_where_its_text_says(grid):
    rng = random.Random(grid)
    pixels = 64
    for _ in range(40):
        size = width, height = rng.randint(40, 400), rng.randint(40, 400)
        (x1, x2), (y1, y2) = (sorted(rng.sample(range(limit + 1), 2)) for limit in size)
        image = np.zeros((height, width, 3), dtype=np.uint8)
        image[y1:y2, x1:x2] = 255
        square = to_tensor(padded_resize(Image.fromarray(image), grid * pixels))[None].float()
        views = split_views(square, pixels, grid)[0]
        (box,) = Coordinates(4).parse_boxes(Coordinates(4).box((x1, y1, x2, y2), size))
        side = max(size)
        # A shape of under a pixel is never white; a corner lies within a pixel of either picture of where it should.
        if min(x2 - x1, y2 - y1) < 3 * side / (grid * pixels):
            continue
        reach = 1 / (grid * pixels) + 1 / side
        rows = views[1:].reshape(grid, grid, 3, pixels, pixels) if grid > 1 else views[None]
        white = torch.cat([torch.cat(list(row), dim=-1) for row in rows], dim=-2).amin(0) > 180
        at_y, at_x = white.nonzero().unbind(1)
        place = (int(at_x.min()), int(at_y.min()), int(at_x.max()) + 1, int(at_y.max()) + 1)
        assert max(abs(a / (grid * pixels) - b) for a, b in zip(place, box, strict=True)) <= reach
