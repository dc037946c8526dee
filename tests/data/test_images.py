import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from sphinx_pl.data.bad import BadSample
from sphinx_pl.data.images import PAD_COLOUR, decode, image_size, load_image, padded_resize, read_bytes
from sphinx_pl.data.record import ImageRef


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


def reason(data, tmp_path, **options):
    path = tmp_path / "image"
    path.write_bytes(data)
    with pytest.raises(BadSample) as caught:
        load_image(ImageRef(str(path)), 16, **options)
    return caught.value.reason


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


@pytest.mark.parametrize(("width", "height"), [(640, 480), (50, 49), (480, 640), (100, 1), (1, 1), (16, 12), (9, 5)])
@pytest.mark.parametrize("size", [1, 16, 224])
def test_the_padding_that_is_left_out_of_the_first_pass_changes_no_byte(width, height, size):
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
    with pytest.raises(BadSample) as caught:
        load_image(ImageRef(str(tmp_path / "no.jpg")), 16)
    assert caught.value.reason == "image_missing"
    path = tmp_path / "shard.tar"
    path.write_bytes(encoded(photo()))
    with pytest.raises(BadSample) as caught:
        load_image(ImageRef(str(path), 0, 10**6), 16)
    assert caught.value.reason == "image_truncated"


def test_what_is_not_a_regular_file_is_not_read():
    for path in ("/dev/zero", "/dev"):
        with pytest.raises(BadSample) as bad:
            read_bytes(ImageRef(path))
        assert bad.value.reason == "image_unreadable"


def test_the_padded_square_is_bounded_too(tmp_path):
    thin = png_header(79_900, 800)  # few enough pixels by itself, 25 GB as a square
    assert reason(thin, tmp_path) == "image_too_large"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_headers_size_is_the_decoded_one(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.jpg"
    photo(40, 30).save(path, exif=exif)
    assert image_size(ImageRef(str(path))) == decode(path.read_bytes()).size


def test_a_size_is_refused_as_the_image_is(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png_header(100_000, 100_000))
    with pytest.raises(BadSample, match="image_too_large"):
        image_size(ImageRef(str(path)))
    path.write_bytes(b"text")
    with pytest.raises(BadSample, match="image_unreadable"):
        image_size(ImageRef(str(path)))
