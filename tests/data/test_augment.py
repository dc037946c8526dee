"""Augmented annotations against the pixels that a model would see, and what has to stay as it is."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sphinx_pl.data.augment import TEXT_TASKS, AugmentConfig, augment, augment_together
from sphinx_pl.data.coordinates import COCO_KEYPOINTS, Coordinates, padded_frame
from sphinx_pl.data.images import annotated_images, image_size, load_image
from sphinx_pl.data.sampling.resume_state import sample_from_plain, sample_to_plain
from sphinx_pl.data.schema import ImageRef, Record, Region, Sample, Turn
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.utils.config import build
from sphinx_pl.utils.errors import UserError
from tests.examples import EXAMPLES, LEFT, LOW, PERSON, RIGHT

FLIP = AugmentConfig(flip=1.0)
CROP = AugmentConfig(crop=1.0, min_area=0.2)
BOTH = AugmentConfig(flip=0.5, crop=0.8, min_area=0.3)

# How an upright image has to be stored so that EXIF's orientation turns it back.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def save(path: Path, pixels: np.ndarray[Any, Any], orientation: int = 1) -> ImageRef:
    image = Image.fromarray(pixels)
    turn = STORED[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    (image if turn is None else image.transpose(turn)).save(path, exif=exif)
    return ImageRef(str(path))


def shown(record: Record) -> np.ndarray[Any, Any]:
    """The record's image as it is decoded, [height, width, 3], without padding or resizing."""
    width, height = size = record.sizes[0]
    assert image_size(record.images[0]) == size
    side, dx, dy = padded_frame(size)
    pixels = load_image(record.images[0], side).permute(1, 2, 0).numpy()
    return np.asarray(pixels[dy : dy + height, dx : dx + width])


WORDS = ("one", "two", "three")  # digits could be writing in the picture


def extent(mask: np.ndarray[Any, Any]) -> tuple[int, int, int, int]:
    y, x = mask.nonzero()
    return int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1


def test_moved_boxes_and_keypoints_still_surround_their_pixels(tmp_path: Path) -> None:
    rng = random.Random(0)
    flipped = cropped = cut = lost = 0
    for _ in range(800):
        width, height = rng.randint(12, 90), rng.randint(12, 90)
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        regions = []
        # Each region has its own colour, and none covers another.
        for number in range(1, rng.randint(1, 3) + 1):
            (x1, x2), (y1, y2) = (sorted(rng.sample(range(limit + 1), 2)) for limit in (width, height))
            if not pixels[y1:y2, x1:x2].any():
                pixels[y1:y2, x1:x2, 0] = 50 * number
                regions.append(Region((x1, y1, x2, y2), f"thing {WORDS[number - 1]}"))
        task = rng.choice(["rec", "detection", "detection_all", "relation_detection"])
        if task == "relation_detection" and len(regions) < 2:
            task = "rec"
        record = Record(
            "k",
            task,
            (save(tmp_path / "image.png", pixels, rng.randint(1, 8)),),
            ((width, height),),
            question=regions[0].label,
            answer="near",
            regions=tuple(regions),
        )
        moved = augment(record, BOTH, rng)
        picture = shown(moved)
        flipped += moved.images[0].flip
        cropped += moved.images[0].crop is not None
        assert {region.label for region in moved.regions} <= {region.label for region in regions}
        assert task.startswith("detection") or len(moved.regions) == len(regions)
        for region in moved.regions:
            assert extent(picture[:, :, 0] == 50 * (WORDS.index(region.label.split()[1]) + 1)) == region.box
            original = next(other for other in regions if other.label == region.label)
            area, before = ((box[2] - box[0]) * (box[3] - box[1]) for box in (region.box, original.box))
            assert area >= (1 - BOTH.max_cut) * before
            cut += area < before
        lost += len(regions) - len(moved.regions)
        # Of what is lost nothing is seen any more: "all" are still all.
        kept = {50 * (WORDS.index(region.label.split()[1]) + 1) for region in moved.regions}
        assert set(np.unique(picture[:, :, 0]).tolist()) <= {0, *kept}
        if moved.images[0].crop is None:
            assert moved.sizes == record.sizes
        else:
            assert moved.sizes[0][0] * moved.sizes[0][1] >= BOTH.min_area * width * height
    assert min(flipped, cropped, cut, lost) > 20


def test_moved_keypoints_lie_on_their_pixels(tmp_path: Path) -> None:
    rng = random.Random(1)
    kept = absent = 0
    for _ in range(300):
        width, height = rng.randint(20, 70), rng.randint(20, 70)
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        spots = rng.sample([(x, y) for x in range(width) for y in range(height)], len(COCO_KEYPOINTS))
        keypoints = []
        for number, (x, y) in enumerate(spots, 1):
            visibility = rng.randint(0, 2)
            pixels[y, x] = 10 * number
            keypoints.append((x + 0.5, y + 0.5, visibility) if visibility else (0, 0, 0))  # the pixel's middle
        xs, ys = zip(*spots, strict=True)
        person = Region((min(xs), min(ys), max(xs) + 1, max(ys) + 1), "person", tuple(keypoints))
        ref = save(tmp_path / "image.png", pixels, rng.randint(1, 8))
        record = Record("k", "pose", (ref,), ((width, height),), regions=(person,))
        moved = augment(record, BOTH, rng)
        picture = shown(moved)[:, :, 0]
        for number, (name, before) in enumerate(zip(COCO_KEYPOINTS, keypoints, strict=True), 1):
            # A mirrored left hand is a right one.
            swapped = {"left": "right", "right": "left"}
            if moved.images[0].flip:
                name = " ".join(swapped.get(word, word) for word in name.split())
            x, y, visibility = moved.regions[0].keypoints[COCO_KEYPOINTS.index(name)]
            if visibility:
                assert visibility == before[2]
                assert picture[int(y), int(x)] == 10 * number
                kept += 1
            else:
                assert (x, y) == (0, 0)
                assert not before[2] or not (picture == 10 * number).any()
                absent += before[2] > 0
        TASKS["pose"].turns(moved, Coordinates())
    assert min(kept, absent) > 200


def test_a_flip_worked_by_hand() -> None:
    record = dataclasses.replace(EXAMPLES["pose"], regions=(dataclasses.replace(PERSON, box=(10, 0, 60, 50)),))
    moved = augment(record, FLIP, random.Random(0))
    (person,) = moved.regions
    assert person.box == (40, 0, 90, 50)
    # The nose at 50 stays there; the left shoulder at 10 is the right one at 90.
    assert person.keypoints[0] == (50, 25, 2)
    assert person.keypoints[5] == (0, 0, 0)
    assert person.keypoints[6] == (90, 5, 2)
    assert moved.images == (ImageRef("a.jpg", flip=True),)
    assert moved.sizes == record.sizes


def test_a_crop_is_applied_before_the_flip(tmp_path: Path) -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)[:, :, None].repeat(3, 2)
    ref = save(tmp_path / "a.png", pixels)
    changed = dataclasses.replace(ref, crop=(1, 0, 4, 3), flip=True)
    assert image_size(changed) == (3, 3)
    np.testing.assert_array_equal(load_image(changed, 3).permute(1, 2, 0).numpy(), pixels[0:3, 1:4][:, ::-1])


@pytest.mark.parametrize("crop", [(0, 0, 7, 4), (-1, 0, 3, 3), (3, 0, 3, 4), (0, 3, 6, 2)])
def test_a_crop_outside_the_image_is_refused(tmp_path: Path, crop: tuple[int, int, int, int]) -> None:
    ref = dataclasses.replace(save(tmp_path / "a.png", np.zeros((4, 6, 3), dtype=np.uint8)), crop=crop)
    for read in (image_size, lambda ref: load_image(ref, 8)):
        with pytest.raises(SkipSample) as bad:
            read(ref)
        assert bad.value.reason == "crop_outside"


def test_off_means_untouched(subtests: pytest.Subtests) -> None:
    for record in EXAMPLES.values():
        with subtests.test(task=record.task):
            rng = random.Random(0)
            state = rng.getstate()
            assert augment(record, AugmentConfig(), rng) is record
            assert rng.getstate() == state
            assert augment(record, AugmentConfig(flip=1, crop=1), None) is record


def test_which_examples_are_changed(subtests: pytest.Subtests) -> None:
    """Each of them is about places, has known sizes and says nothing of sides but for one."""
    for record in EXAMPLES.values():
        with subtests.test(task=record.task):
            coordinates = {
                *("rec", "reg", "pose", "detection", "detection_all"),
                *("grounded_vqa", "relation_detection"),
            }  # grounded_caption says "left of"
            flips = any(augment(record, FLIP, random.Random(i)).images[0].flip for i in range(3))
            crops = any(augment(record, CROP, random.Random(i)).images[0].crop for i in range(30))
            assert flips is (record.task in coordinates)
            if record.task != "pose":  # whose example fills the image
                assert crops is (record.task in coordinates | TEXT_TASKS)


@pytest.mark.parametrize(
    "text",
    [
        "man on left",
        "the leftmost",
        "Right-hand one",
        "guy in r corner",
        "lft",
        "turn clockwise",
        "anti-clockwise arrow",
    ],
)
def test_text_about_sides_is_never_mirrored(text: str) -> None:
    for record in (
        dataclasses.replace(EXAMPLES["rec"], question=text),
        dataclasses.replace(EXAMPLES["relation_detection"], answer=text),
        dataclasses.replace(EXAMPLES["reg"], regions=(dataclasses.replace(LEFT, label=text),)),
        dataclasses.replace(EXAMPLES["rec"], turns=(Turn("Where?", text),)),
    ):
        assert augment(record, FLIP, random.Random(0)) is record
        assert augment(record, CROP, random.Random(0)) is record


@pytest.mark.parametrize("text", ["player in jersey 23", "sign that says STOP", "the clock", "NIKE shirt", 'a "B"'])
def test_what_quotes_writing_is_never_mirrored(text: str) -> None:
    record = dataclasses.replace(EXAMPLES["rec"], question=text)
    assert all(augment(record, FLIP, random.Random(i)) is record for i in range(5))


@pytest.mark.parametrize("text", ["the brightest", "an upright bottle", "red car", "aleft"])
def test_other_words_do_not_stop_a_flip(text: str) -> None:
    assert augment(dataclasses.replace(EXAMPLES["rec"], question=text), FLIP, random.Random(0)).images[0].flip


@pytest.mark.parametrize(
    "text",
    ["top dog", "second car", "the 3rd one", "in the middle", "how many", "man on the far end", "cut off by the frame"],
)
def test_text_about_places_and_counts_is_never_cropped(text: str) -> None:
    record = dataclasses.replace(EXAMPLES["rec"], question=text)
    assert all(augment(record, CROP, random.Random(i)) is record for i in range(20))


def test_what_has_no_size_finished_places_or_two_images_stays() -> None:
    rec = EXAMPLES["rec"]
    for record in (
        dataclasses.replace(rec, sizes=()),
        dataclasses.replace(rec, turns=(Turn("Where is it?", "[0.1,0.2,0.3,0.4]"),)),
        dataclasses.replace(rec, turns=(Turn("What is at [0.1,0.2]?", "a dot"),)),
        dataclasses.replace(rec, images=rec.images * 2),
        dataclasses.replace(rec, images=()),
        dataclasses.replace(rec, images=(ImageRef("a", flip=True),)),
        dataclasses.replace(rec, images=(ImageRef("a", crop=(0, 0, 100, 50)),)),
        dataclasses.replace(rec, regions=(Region((50, 10, 40, 20)),)),  # its task has to refuse these
        dataclasses.replace(rec, regions=(Region((50, 10, 400, 20)),)),
        dataclasses.replace(rec, regions=(Region((float("nan"), 10, 40, 20)),)),
        dataclasses.replace(EXAMPLES["pose"], regions=(dataclasses.replace(PERSON, keypoints=((1, 1, 2),)),)),
    ):
        assert augment(record, dataclasses.replace(BOTH, flip=1.0, crop=1.0), random.Random(0)) is record


NOTATIONS = (
    *("<box>[[100, 100, 300, 500]]</box>", "[20, 10, 60, 50]", "<loc0100><loc0200>", "[0.1, 0.3, 0.3, 0.5]"),
    *("(20,10),(60,50)", "<|box_start|>(20,10),(60,50)<|box_end|>", '<point x="61.5" y="40.4">', "{<20><10><60><50>}"),
    *(
        "x1: 20, y1: 10",
        "20 10 60 50",
        "30% across and 20% down",
        "<seg001>",
        "polygon 1,2 3,4 5,6",
        "<ref>it</ref>[[1,2,3,4]]",
    ),
    *('{"bbox_2d": [20, 10, 60, 50]}', "at pixel 20", "[２０，１０，６０，５０]", "its bounding box is twenty wide"),
)


def test_text_that_may_hold_coordinates_is_left_alone_and_counted(subtests: pytest.Subtests) -> None:
    for text in NOTATIONS:
        with subtests.test(text=text):
            both = dataclasses.replace(BOTH, flip=1.0, crop=1.0, flip_tasks=["rec", "chat"], crop_tasks=["rec", "chat"])
            plain = dataclasses.replace(EXAMPLES["chat"], question="What is it?", answer="a shape")
            assert augment(plain, both, random.Random(0)) != plain
            records = [
                dataclasses.replace(plain, question=text),
                dataclasses.replace(plain, answer=text),
                dataclasses.replace(plain, choices=("a", text)),
                dataclasses.replace(EXAMPLES["rec"], question=text),
                dataclasses.replace(EXAMPLES["rec"], turns=(Turn("<image>\nWhere is it?", text),)),
                dataclasses.replace(EXAMPLES["rec"], turns=(Turn(text, "a shape"),)),
            ]
            counts: Counter[str] = Counter()
            for record in records:
                assert augment_together([record], both, random.Random(0), counts)[0] is record
            assert counts == ({} if "bounding" in text else {"not_augmented/coordinates_in_text": len(records)})


def test_what_is_read_out_of_the_picture_may_have_digits() -> None:
    regions = (dataclasses.replace(LEFT, label="EXIT 12"), dataclasses.replace(RIGHT, label="3.50"))
    record = dataclasses.replace(EXAMPLES["ocr"], regions=regions)
    assert any(augment(record, CROP, random.Random(i)).images[0].crop for i in range(30))


@pytest.mark.parametrize("text", ["左边的猫", "le chat à gauche"])
def test_text_beyond_ascii_is_never_mirrored(text: str) -> None:
    record = dataclasses.replace(EXAMPLES["rec"], question=text)
    assert all(augment(record, FLIP, random.Random(i)) is record for i in range(5))


def test_a_crop_knows_the_size_that_it_is_about(tmp_path: Path) -> None:
    pixels = np.zeros((50, 100, 3), dtype=np.uint8)
    record = dataclasses.replace(EXAMPLES["rec"], images=(save(tmp_path / "a.png", pixels),))
    moved = next(m for i in range(30) if (m := augment(record, CROP, random.Random(i))).images[0].crop)
    assert moved.images[0].annotated == (100, 50)
    assert annotated_images(moved) == moved.images
    # The same picture in twice the resolution has the same crop.
    larger = save(tmp_path / "b.png", np.zeros((100, 200, 3), dtype=np.uint8))
    repeat = dataclasses.replace(moved.images[0], path=larger.path)
    assert image_size(repeat) == tuple(2 * side for side in moved.sizes[0])


def test_captions_are_flipped_where_the_configuration_says_so_without_a_size_too() -> None:
    record = dataclasses.replace(EXAMPLES["caption"], sizes=())
    config = AugmentConfig(flip=1, crop=1, flip_tasks=["caption"], crop_tasks=["caption"])
    moved = augment(record, config, random.Random(0))
    assert moved == dataclasses.replace(record, images=(ImageRef("a.jpg", flip=True),))


def test_detection_may_lose_regions_but_not_all_that_were_asked_for() -> None:
    counts = set()
    for task in ("detection", "detection_all"):
        for seed in range(300):
            moved = augment(EXAMPLES[task], CROP, random.Random(seed))
            answer = TASKS[task].turns(moved, Coordinates())[0].answer
            assert answer != "None"
            counts.add((task, len(moved.regions)))
    assert counts == {(task, count) for task in ("detection", "detection_all") for count in (1, 2, 3)}
    nothing = dataclasses.replace(EXAMPLES["detection"], question="cat")
    assert any(augment(nothing, CROP, random.Random(seed)) != nothing for seed in range(10))


def test_text_in_the_picture_is_never_cut() -> None:
    changed = 0
    for seed in range(200):
        moved = augment(EXAMPLES["ocr"], CROP, random.Random(seed))
        changed += moved.images[0].crop is not None
        areas = [(r.box[2] - r.box[0]) * (r.box[3] - r.box[1]) for r in moved.regions]
        assert areas == [400, 1000, 100]
    assert changed > 20


def test_records_about_one_image_are_changed_in_one_way() -> None:
    group = [EXAMPLES["rec"], EXAMPLES["reg"], EXAMPLES["relation_detection"]]
    paths = set()
    for seed in range(50):
        moved = augment_together(group, BOTH, random.Random(seed))
        assert len({record.images for record in moved}) == 1
        assert moved[0].regions[0] == moved[1].regions[0] == moved[2].regions[0]
        paths.add((moved[0].images[0].flip, moved[0].images[0].crop is not None))
    assert len(paths) == 4
    # One that cannot be moved holds all.
    assert augment_together([*group, EXAMPLES["short_vqa"]], FLIP, random.Random(0)) == [
        *group,
        EXAMPLES["short_vqa"],
    ]
    other = dataclasses.replace(EXAMPLES["rec"], images=(ImageRef("b.jpg"),))
    assert augment_together([*group, other], FLIP, random.Random(0)) == [*group, other]
    assert augment_together([], FLIP, random.Random(0)) == []


def test_same_random_numbers_same_record() -> None:
    record = dataclasses.replace(EXAMPLES["detection_all"], regions=(LEFT, RIGHT, LOW))
    assert [augment(record, BOTH, random.Random(i)) for i in range(20)] == [
        augment(record, BOTH, random.Random(i)) for i in range(20)
    ]


def test_a_resumed_run_decodes_the_same_pixels() -> None:
    images = (ImageRef("a.tar", 512, 99, (1, 2, 30, 40), True, (50, 60)), ImageRef("b.jpg"))
    sample = Sample([1], [], images, "s")
    plain = sample_to_plain(sample)
    assert sample_from_plain(plain) == sample
    assert sample_from_plain(plain).images[0].annotated == (50, 60)
    # As checkpoints had it before images knew their annotated size.
    older = plain | {"images": [image[:5] for image in plain["images"]]}
    assert sample_from_plain(older) == sample


def test_the_configuration_is_built_and_checked() -> None:
    config = build(AugmentConfig, {"flip": 0.5, "crop_tasks": ["rec"]}, "data.augment")
    assert config.flip == 0.5
    assert config.crop_tasks == ["rec"]
    for values, message in (
        ({"flip": 1.5}, "data.augment.flip=1.5"),
        ({"crop": -1}, "data.augment.crop=-1"),
        ({"min_area": 0}, "min_area"),
        ({"max_cut": 1}, "max_cut"),
        ({"flip_tasks": ["recc"]}, "did you mean 'rec'"),
        ({"flip_tasks": ["ocr"]}, "mirrored text"),
        ({"flop": 1}, "data.augment.flop"),
    ):
        with pytest.raises(UserError, match=message):
            build(AugmentConfig, values, "data.augment")


def test_a_batch_shows_what_the_reference_says(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[:, :4] = 255
    ref = save(tmp_path / "a.png", pixels)
    plain, flipped = load_image(ref, 8), load_image(dataclasses.replace(ref, flip=True), 8)
    assert torch.equal(flipped, plain.flip(-1))
