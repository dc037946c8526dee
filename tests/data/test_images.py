import dataclasses
import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from sphinx_pl.data.images import PAD_COLOUR, decode, image_size, load_image, padded_resize, read_bytes
from sphinx_pl.data.schema import ImageRef
from sphinx_pl.data.skip import SkipSample


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photo(width=40, height=30):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png_header(width, height):
    """A PNG that claims a size and holds no pixels: enough to open, nothing to decode."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def problem(data, tmp_path, **options):
    path = tmp_path / "image"
    path.write_bytes(data)
    with pytest.raises(SkipSample) as caught:
        load_image(ImageRef(str(path)), 16, **options)
    return caught.value


def reason(data, tmp_path, **options):
    return problem(data, tmp_path, **options).reason


def png16(values, colour):
    """A PNG with 16 bits a channel: values [height, width, channels], PNG's number of the kind of colour."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values.reshape(height, -1))
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def oriented(form, image, orientation, **options):
    """An image file whose pixels are `image` and which says how to turn them."""
    if form == "TIFF":
        return encoded(image, form, tiffinfo={0x0112: orientation}, **options)
    if form == "XMP":
        return encoded(image, "JPEG", xmp=f'<x tiff:Orientation="{orientation}"/>'.encode(), **options)
    exif = Image.Exif()
    exif[0x0112] = orientation
    more = {"save_all": True, "append_images": [image.copy()]} if form == "MPO" else {}
    return encoded(image, form, exif=exif, **more, **options)


def blue_square(size=(200, 100), box=(20, 10, 60, 50)):
    image = Image.new("RGB", size, "white")
    image.paste((0, 0, 255), box)
    return image


def place_of_blue(pixels):
    """Where the blue square is, in fractions of the padded square."""
    red, green, blue = pixels.numpy().astype(int)
    y, x = np.where((blue > 150) & (red < 100) & (green < 100))
    side = pixels.shape[-1]
    return [round(float(v) / side, 2) for v in (x.min(), y.min(), x.max() + 1, y.max() + 1)]


def test_pads_in_the_middle_with_the_odd_row_below(tmp_path):
    image = photo(8, 5)  # 3 rows of padding: 1 above, 2 below
    path = tmp_path / "a.png"
    image.save(path)
    tensor = load_image(ImageRef(str(path)), 8).numpy()
    assert tensor.shape == (3, 8, 8)
    assert tensor.dtype == np.uint8
    np.testing.assert_array_equal(tensor[:, 1:6], np.asarray(image).transpose(2, 0, 1))
    for row in (0, 6, 7):
        np.testing.assert_array_equal(tensor[:, row].T, np.tile(PAD_COLOUR, (8, 1)))


def test_resize_is_bicubic_with_antialias():
    # A checkerboard of single pixels averages to grey only if the filter covers them.
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    small = np.asarray(padded_resize(Image.fromarray(board).convert("RGB"), 16)).astype(int)
    assert abs(small[2:-2, 2:-2] - 127.5).max() < 3


def test_the_padding_that_is_left_out_of_the_first_pass_changes_no_byte(subtests):
    for width, height in ((640, 480), (50, 49), (480, 640), (100, 1), (1, 1), (16, 12), (9, 5)):
        for size in (1, 16, 224):
            with subtests.test(width=width, height=height, size=size):
                image, side = photo(width, height), max(width, height)
                square = Image.new("RGB", (side, side), PAD_COLOUR)
                square.paste(image, ((side - width) // 2, (side - height) // 2))
                plain = square.resize((size, size), Image.Resampling.BICUBIC)  # the original's way
                np.testing.assert_array_equal(np.asarray(padded_resize(image, size)), np.asarray(plain))


def test_part_of_a_larger_file(tmp_path):
    data = encoded(photo())
    path = tmp_path / "shard.tar"
    path.write_bytes(b"x" * 100 + data + b"y" * 100)
    whole = tmp_path / "a.png"
    whole.write_bytes(data)
    inside = load_image(ImageRef(str(path), 100, len(data)), 16)
    assert inside.equal(load_image(ImageRef(str(whole)), 16))


def test_exif_orientation_is_applied():
    image = photo()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    upright = decode(encoded(image, exif=exif))
    assert upright.size == (30, 40)
    np.testing.assert_array_equal(np.asarray(upright), np.rot90(np.asarray(image), -1))


RAMP = np.linspace(0, 1, 800, dtype=np.float32).reshape(20, 40)


def test_grey_of_more_than_8_bits_is_never_black(subtests):
    for top in (1, 200, 255, 300, 1023, 4095, 16383, 65535):
        grey = (RAMP * top).astype(np.uint16)
        files = {
            "PNG": png16(grey, 0),
            "TIFF": encoded(Image.fromarray(grey.astype(">u2")), "TIFF"),
            "PGM": b"P5 40 20 65535\n" + grey.astype(">u2").tobytes(),
        }
        for form, data in files.items():
            with subtests.test(form=form, top=top):
                values = np.asarray(decode(data))
                assert values.min() == 0
                assert values.max() == (200 if top == 200 else 255)  # of 8 bits all stay as they are


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 0.5, 1], [0, 127, 255]),
        ([0, 100.5, 200], [0, 100, 200]),  # of 8 bits, as Pillow has it
        ([-100, 0, 100], [0, 127, 255]),
        ([1000, 1050, 1100], [0, 127, 255]),
        ([np.nan, 0.5, np.inf, -np.inf, 0, 1], [0, 127, 255, 0, 0, 255]),
        ([0.7, 0.7], [178, 178]),
        ([0, 0], [0, 0]),
    ],
)
def test_floats_are_scaled_by_their_range(values, expected):
    image = Image.fromarray(np.array([values], dtype=np.float32))
    np.testing.assert_array_equal(np.asarray(decode(encoded(image, "TIFF")))[0, :, 0], expected)


def test_floats_without_a_number_are_counted(tmp_path):
    nothing = Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32))
    assert reason(encoded(nothing, "TIFF"), tmp_path) == "image_unreadable"


def test_integers_of_32_bits_are_scaled_by_their_range():
    image = Image.fromarray(np.array([[-500, 0, 500]], dtype=np.int32))
    np.testing.assert_array_equal(np.asarray(decode(encoded(image, "TIFF")))[0, :, 0], [0, 127, 255])


def test_dark_colours_of_16_bits_are_counted(tmp_path):
    # Of 16 bits Pillow reads the upper 8, so that most of these are black.
    for channels, colour in ((3, 2), (2, 4), (4, 6)):
        alpha = np.full((20, 40), 65535)
        for top, usable in ((255, False), (4095, False), (16383, True), (65535, True)):
            grey = (RAMP * top).astype(np.uint16)
            colours = [grey, *([grey, grey] if channels > 2 else []), *([alpha] if channels % 2 == 0 else [])]
            data = png16(np.stack(colours, -1), colour)
            if usable:
                assert np.asarray(decode(data)).max() == top // 256
            else:
                assert reason(data, tmp_path) == "image_dark"
                with pytest.raises(SkipSample, match="image_dark"):
                    decode(data, annotated=(40, 20))
    assert reason(b"P6 4 2 65535\n" + bytes([0, 200] * 24), tmp_path) == "image_dark"
    assert decode(encoded(Image.new("RGB", (4, 4)))).getpixel((0, 0)) == (0, 0, 0)  # 8 bits may be black


def test_sixteen_bits_are_scaled_not_clipped():
    grey = np.array([[0, 257 * 10, 65535, 257 * 200]], dtype=np.uint16)
    np.testing.assert_array_equal(np.asarray(decode(encoded(Image.fromarray(grey))))[0, :, 0], [0, 10, 255, 200])


def test_transparency_lies_on_white():
    rgba = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    rgba.putpixel((1, 0), (10, 20, 30, 255))
    np.testing.assert_array_equal(np.asarray(decode(encoded(rgba)))[0], [[255, 255, 255], [10, 20, 30]])


def test_palette_with_a_transparent_colour():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    image = decode(encoded(palette, transparency=0))
    np.testing.assert_array_equal(np.asarray(image)[0], [[255, 255, 255], [40, 50, 60]])


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    image = decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert image.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(("mode", "format"), [("CMYK", "JPEG"), ("L", "JPEG"), ("1", "PNG"), ("LA", "PNG")])
def test_other_modes_become_rgb(mode, format):
    image = decode(encoded(Image.new(mode, (4, 4)), format))
    assert image.mode == "RGB"
    assert image.size == (4, 4)


def test_damaged_and_foreign_files(tmp_path):
    jpeg = encoded(photo(), "JPEG")
    assert reason(b"", tmp_path) == "image_empty"
    assert reason(b"<html>not found</html>", tmp_path) == "image_unreadable"
    assert reason(jpeg[:3], tmp_path) == "image_unreadable"
    assert reason(jpeg[: len(jpeg) // 2], tmp_path) == "image_truncated"
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", tmp_path) == "image_unreadable"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"<!DOCTYPE html>\n<p>404", "web page"),
        (b"\xef\xbb\xbf <HTML>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
        (b'{"error": "forbidden"}\n', 'it is text, not an image: \'{"error"'),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "'heic'"),
        (b"\xff\xd8\xff", "none of JPEG, PNG"),
        (png_header(9000, 9000), "9000x9000, at most 64,000,000 pixels and 16,000 a side"),
        (png_header(50_000, 50_000), "2,500,000,000 pixels, at most 64,000,000 pixels"),
        (png_header(1010, 10), "1010x10"),
    ],
)
def test_the_detail_says_what_a_file_is_instead(tmp_path, data, words):
    bad = problem(data, tmp_path)
    assert words in bad.detail
    assert str(tmp_path) in bad.detail
    assert "MPO" not in bad.detail
    assert "\n" not in str(bad)


def test_avif_is_read_where_pillow_reads_it():
    if features.check("avif"):
        assert decode(encoded(blue_square(), "AVIF")).size == (200, 100)


def test_bounds_hold_before_any_pixel_is_decoded(tmp_path):
    assert reason(png_header(9000, 9000), tmp_path) == "image_too_large"
    assert reason(png_header(50_000, 50_000), tmp_path) == "image_too_large"  # above Pillow's own bound, too
    assert reason(png_header(1010, 10), tmp_path) == "image_aspect"
    assert reason(encoded(photo(40, 30)), tmp_path, max_pixels=1199) == "image_too_large"


def test_aspect_of_exactly_the_bound_is_fine(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (1000, 10)).save(path)
    assert load_image(ImageRef(str(path)), 16).shape == (3, 16, 16)


def test_missing_file_and_file_that_ends_early(tmp_path):
    with pytest.raises(SkipSample) as caught:
        load_image(ImageRef(str(tmp_path / "no.jpg")), 16)
    assert caught.value.reason == "image_missing"
    path = tmp_path / "shard.tar"
    path.write_bytes(encoded(photo()))
    with pytest.raises(SkipSample) as caught:
        load_image(ImageRef(str(path), 0, 10**6), 16)
    assert caught.value.reason == "image_truncated"


def test_what_is_not_a_regular_file_is_not_read():
    for path in ("/dev/zero", "/dev"):
        with pytest.raises(SkipSample) as bad:
            read_bytes(ImageRef(path))
        assert bad.value.reason == "image_unreadable"


def test_the_padded_square_is_bounded_too(tmp_path):
    thin = png_header(79_900, 800)  # few enough pixels by itself, 25 GB as a square
    assert reason(thin, tmp_path) == "image_too_large"


ORIENTED = ["JPEG", "MPO", "PNG", "WEBP", "TIFF", "XMP", *(["AVIF"] if features.check("avif") else [])]


def test_the_headers_size_is_the_decoded_one(tmp_path, subtests):
    for size in ((40, 30), (300, 200)):  # the larger ones go beyond what is read of a header
        for form in ORIENTED:
            for orientation in range(1, 9):
                with subtests.test(size=size, form=form, orientation=orientation):
                    path = tmp_path / "image"
                    path.write_bytes(oriented(form, photo(*size), orientation))
                    upright = decode(path.read_bytes()).size
                    assert upright == (size if orientation < 5 else size[::-1])
                    assert image_size(ImageRef(str(path))) == upright
                    # As they were annotated: in both orientations.
                    for annotated in (size, upright):
                        ref = ImageRef(str(path), annotated=annotated)
                        assert image_size(ref) == decode(path.read_bytes(), annotated=annotated).size == annotated


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "jpeg"])
def test_a_turned_tiff_is_turned_once(tmp_path, compression):
    path = tmp_path / "image"
    path.write_bytes(oriented("TIFF", blue_square(), 6, compression=compression))
    assert image_size(ImageRef(str(path))) == (100, 200)
    upright = [0.5, 0.1, 0.7, 0.3]
    assert place_of_blue(load_image(ImageRef(str(path)), 500)) == upright


def test_coordinates_hold_in_the_orientation_in_which_they_were_annotated(tmp_path, subtests):
    path = tmp_path / "image"

    def place(annotated=None):
        return place_of_blue(load_image(ImageRef(str(path), annotated=annotated), 500))

    for form in ORIENTED:
        for orientation in range(1, 9):
            with subtests.test(form=form, orientation=orientation):
                path.write_bytes(oriented(form, blue_square(), orientation))
                if orientation >= 5:
                    assert place((200, 100)) == [0.1, 0.3, 0.3, 0.5]
                    assert place((100, 200)) == place()
                else:  # mirrored or upside down: the shape does not tell, so the image is upright
                    assert place((200, 100)) == place()


def test_a_square_does_not_tell_its_orientation_and_is_upright(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(oriented("JPEG", blue_square((100, 100)), 6))
    plain, annotated = (load_image(ImageRef(str(path), annotated=size), 100) for size in (None, (100, 100)))
    assert plain.equal(annotated)


@pytest.mark.parametrize(
    ("annotated", "fits"),
    [
        *(((200, 100), True), ((400, 200), True), ((100, 50), True), ((201, 100), True), ((333, 167), True)),
        *(((100, 200), False), ((200, 110), False), ((200, 200), False), ((1, 1), False), ((640, 480), False)),
    ],
)
def test_another_resolution_is_harmless_and_another_shape_is_not(tmp_path, annotated, fits):
    path = tmp_path / "image.png"
    blue_square().save(path)
    ref = ImageRef(str(path), annotated=annotated)
    if fits:
        assert load_image(ref, 500).equal(load_image(ImageRef(str(path)), 500))
        return
    for read in (image_size, lambda ref: load_image(ref, 500)):
        with pytest.raises(SkipSample) as bad:
            read(ref)
        assert bad.value.reason == "size_mismatch"
        assert "200x100" in bad.value.detail


def test_a_crop_is_in_pixels_of_the_annotated_size(tmp_path):
    path = tmp_path / "image.png"
    blue_square().save(path)
    plain = ImageRef(str(path), crop=(10, 0, 110, 100))
    scaled = dataclasses.replace(plain, crop=(20, 0, 220, 200), annotated=(400, 200))
    assert image_size(scaled) == (100, 100)
    assert load_image(scaled, 100).equal(load_image(plain, 100))


def test_references_survive_json():
    ref = ImageRef("a.jpg", 1, 2, (1, 2, 3, 4), True, (5, 6))
    repeat = ImageRef.from_dict(json.loads(json.dumps(dataclasses.asdict(ref))))
    assert dataclasses.asdict(repeat) == dataclasses.asdict(ref)
    assert ImageRef.from_dict({"path": "a.jpg", "offset": 0, "size": -1, "crop": None, "flip": False}) == ImageRef(
        "a.jpg"
    )


def test_a_size_is_refused_as_the_image_is(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png_header(100_000, 100_000))
    with pytest.raises(SkipSample, match="image_too_large"):
        image_size(ImageRef(str(path)))
    path.write_bytes(b"text")
    with pytest.raises(SkipSample, match="image_unreadable"):
        image_size(ImageRef(str(path)))
