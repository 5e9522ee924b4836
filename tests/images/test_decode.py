import errno
import io
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import disc_picture
from fabricate import encoded, png_header
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, JpegImagePlugin

from lostreg.errors import ImageError, ImageUnavailableError, OptionError
from lostreg.images.decode import _FORMATS, MAX_PIXELS, Picture, read_header, read_image
from lostreg.images.files import HEIF_SUFFIXES, SUFFIXES, ImageFile
from lostreg.images.patches import cut_patches, patch_grid
from lostreg.inference.stream import draw_sample
from lostreg.models.pixels import normalise_patches

WIDTH, HEIGHT = 40, 30
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def rgb() -> np.ndarray:
    return disc_picture(WIDTH, HEIGHT)


def save(path: Path, pixels: np.ndarray, mode: str | None = None, **options: object) -> Path:
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".tiff"])
def test_lossless_formats_are_read_exactly(tmp_path: Path, rgb: np.ndarray, suffix: str) -> None:
    picture = read_image(save(tmp_path / f"a{suffix}", rgb))
    assert (picture.width, picture.height) == (WIDTH, HEIGHT)
    assert picture.pixels.dtype == np.uint8
    np.testing.assert_array_equal(picture.pixels, rgb)


@pytest.mark.parametrize(("suffix", "options"), [(".jpg", {"quality": 95}), (".webp", {"lossless": True})])
def test_compressed_formats_are_read_closely(
    tmp_path: Path, rgb: np.ndarray, suffix: str, options: dict[str, object]
) -> None:
    pixels = read_image(save(tmp_path / f"a{suffix}", rgb, **options)).pixels
    assert pixels.shape == rgb.shape
    assert np.abs(pixels.astype(int) - rgb).mean() < 5


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "packbits"])
def test_compressed_tiff(tmp_path: Path, rgb: np.ndarray, compression: str) -> None:
    path = save(tmp_path / "a.tif", rgb, compression=compression)
    np.testing.assert_array_equal(read_image(path).pixels, rgb)


def test_a_name_need_not_match_the_format(tmp_path: Path, rgb: np.ndarray) -> None:
    path = save(tmp_path / "a.png", rgb).rename(tmp_path / "a.jpg")
    np.testing.assert_array_equal(read_image(path).pixels, rgb)


def test_grey_becomes_three_equal_channels(tmp_path: Path, rgb: np.ndarray) -> None:
    pixels = read_image(save(tmp_path / "a.png", rgb[:, :, 0])).pixels
    np.testing.assert_array_equal(pixels, np.repeat(rgb[:, :, :1], 3, axis=2))


@pytest.mark.parametrize("channels", [2, 4])
def test_transparency_is_laid_on_white(tmp_path: Path, rgb: np.ndarray, channels: int) -> None:
    alpha = np.full((HEIGHT, WIDTH, 1), 255, dtype=np.uint8)
    alpha[:10], alpha[10:20] = 0, 102  # 40 %
    colours = rgb[:, :, : channels - 1]
    path = save(tmp_path / "a.png", np.concatenate([colours, alpha], axis=2))
    pixels = read_image(path).pixels.astype(int)
    expected = np.broadcast_to(colours, rgb.shape).astype(int)
    assert (pixels[:10] == 255).all()
    np.testing.assert_allclose(pixels[10:20], 0.4 * expected[10:20] + 0.6 * 255, atol=1)
    np.testing.assert_array_equal(pixels[20:], expected[20:])


def test_a_palette_gives_its_colours(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").pixels, [[[10, 20, 30], [200, 100, 50]]])


@pytest.mark.parametrize("transparency", [1, b"\xff\x00"])
def test_a_transparent_palette_entry_becomes_white(tmp_path: Path, transparency: int | bytes) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=transparency)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").pixels, [[[10, 20, 30], [255, 255, 255]]])


def test_a_transparent_colour_of_an_rgb_file_becomes_white(tmp_path: Path) -> None:
    pixels = np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8)
    path = save(tmp_path / "a.png", pixels, transparency=(4, 5, 6))
    np.testing.assert_array_equal(read_image(path).pixels, [[[1, 2, 3], [255, 255, 255]]])


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    grey = np.array([[0, 257, 300, 128 * 257, 65535]], dtype=np.uint16)
    pixels = read_image(save(tmp_path / f"a{suffix}", grey)).pixels
    np.testing.assert_array_equal(pixels[0], [[value] * 3 for value in (0, 1, 1, 128, 255)])


def test_big_endian_sixteen_bit_tiff(tmp_path: Path) -> None:
    grey = np.array([[0, 257, 65535]], dtype=">u2")
    Image.frombytes("I;16B", (3, 1), grey.tobytes()).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").pixels[0, :, 0], [0, 1, 255])


@pytest.mark.parametrize("grey", [np.full((4, 4), 70000, np.int32), np.full((4, 4), -1, np.int32)])
def test_more_than_sixteen_bits_are_refused(tmp_path: Path, grey: np.ndarray) -> None:
    with pytest.raises(ImageError, match="expected 8 or 16 bits a channel"):
        read_image(save(tmp_path / "a.tif", grey))


def test_floating_point_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="found floating point"):
        read_image(save(tmp_path / "a.tif", np.zeros((4, 4), np.float32)))


def test_cmyk_jpeg(tmp_path: Path) -> None:
    red = np.full((16, 16, 3), (255, 0, 0), dtype=np.uint8)
    path = save(tmp_path / "a.jpg", red, mode="CMYK", quality=95)
    with Image.open(path) as image:
        assert image.mode == "CMYK"
    np.testing.assert_allclose(read_image(path).pixels, red, atol=4)


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    bits = np.array([[True, False], [False, True]])
    pixels = read_image(save(tmp_path / "a.png", bits)).pixels
    np.testing.assert_array_equal(pixels, np.repeat(bits[:, :, None] * np.uint8(255), 3, axis=2))


# What each orientation says of the stored pixels, written with NumPy to have a second opinion.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_or_ignored(tmp_path: Path, rgb: np.ndarray, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    path = save(tmp_path / "a.png", rgb, exif=exif)
    turned, stored = read_image(path), read_image(path, exif=False)
    np.testing.assert_array_equal(turned.pixels, UPRIGHT[orientation](rgb))
    np.testing.assert_array_equal(stored.pixels, rgb)
    assert (stored.width, stored.height) == (WIDTH, HEIGHT)
    assert (turned.width, turned.height) == ((WIDTH, HEIGHT) if orientation < 5 else (HEIGHT, WIDTH))


@pytest.mark.parametrize(("max_side", "size"), [(20, (20, 15)), (39, (39, 29)), (40, (40, 30)), (1000, (40, 30))])
def test_a_side_limit_scales_down_and_keeps_the_original_size(
    rgb: np.ndarray, max_side: int, size: tuple[int, int]
) -> None:
    picture = read_image(rgb, max_side=max_side)
    assert (picture.pixels.shape[1], picture.pixels.shape[0]) == size
    assert (picture.width, picture.height) == (WIDTH, HEIGHT)


def test_halving_averages_pixels(rgb: np.ndarray) -> None:
    halved = read_image(rgb, max_side=WIDTH // 2).pixels
    averaged = rgb.reshape(HEIGHT // 2, 2, WIDTH // 2, 2, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(halved, averaged, atol=1)


def test_a_thin_image_keeps_at_least_one_pixel() -> None:
    assert read_image(np.zeros((1, 5000, 3), np.uint8), max_side=10).pixels.shape == (1, 10, 3)


def test_arrays_and_pil_images_are_taken(rgb: np.ndarray) -> None:
    np.testing.assert_array_equal(read_image(rgb).pixels, rgb)
    np.testing.assert_array_equal(read_image(rgb[:, ::-1]).pixels, rgb[:, ::-1])
    np.testing.assert_array_equal(read_image(Image.fromarray(rgb)).pixels, rgb)
    np.testing.assert_array_equal(
        read_image(Image.fromarray(rgb).convert("L")).pixels[:, :, 2], np.asarray(Image.fromarray(rgb).convert("L"))
    )


def test_read_only_arrays_are_taken_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    pixels = disc_picture(14, 28)  # whole patches in one column: cut without a copy
    pixels.flags.writeable = False
    torch.from_numpy(cut_patches(read_image(pixels), 14).patches)
    assert not recwarn.list


@contextmanager
def drafts() -> Iterator[list[tuple[int, int]]]:
    """The sizes that JPEG files are decoded at, where that was asked for."""
    sizes = []
    real = JpegImagePlugin.JpegImageFile.draft

    def draft(image: Image.Image, *arguments: object) -> object:
        result = real(image, *arguments)
        sizes.append(image.size)
        return result

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(JpegImagePlugin.JpegImageFile, "draft", draft)
        yield sizes


def reduced(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA).astype(int)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("exif", [True, False])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_is_decoded_at_a_fraction_of_its_size(tmp_path: Path, orientation: int, exif: bool, mode: str) -> None:
    tags = Image.Exif()
    tags[0x112] = orientation
    path = save(tmp_path / "a.jpg", disc_picture(1000, 620), mode=mode, quality=95, exif=tags)
    with drafts() as sizes:
        picture = read_image(path, max_side=150, exif=exif)
    assert sizes == [(250, 155)]  # a quarter: an eighth would be less than what is asked for
    whole = read_image(path, exif=exif)
    assert (picture.width, picture.height) == (whole.width, whole.height)
    size = (93, 150) if exif and orientation > 4 else (150, 93)
    assert picture.pixels.shape == (*size[::-1], 3)
    assert np.abs(picture.pixels - reduced(whole.pixels, *size)).mean() < 1.5


@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 600))
@settings(deadline=None, max_examples=60)
def test_a_jpeg_is_never_decoded_at_less_than_what_is_asked_for(
    tmp_path_factory: pytest.TempPathFactory, width: int, height: int, max_side: int
) -> None:
    path = save(tmp_path_factory.getbasetemp() / "drafted.jpg", np.full((height, width, 3), (200, 90, 30), np.uint8))
    with drafts() as sizes:
        picture = read_image(path, max_side=max_side)
    expected = read_image(np.zeros((height, width, 3), np.uint8), max_side=max_side)
    assert (picture.width, picture.height) == (width, height)
    assert picture.pixels.shape == expected.pixels.shape
    np.testing.assert_allclose(picture.pixels, np.broadcast_to((200, 90, 30), picture.pixels.shape), atol=3)
    asked = picture.pixels.shape[1::-1]
    assert all(size[0] >= asked[0] and size[1] >= asked[1] for size in sizes)
    assert len(sizes) == (max(width, height) > max_side)


def test_a_multi_picture_jpeg_is_scaled_down_too(tmp_path: Path) -> None:
    path = tmp_path / "phone.jpg"
    first, second = Image.fromarray(disc_picture(800, 600)), Image.new("RGB", (800, 600), "blue")
    first.save(path, format="MPO", save_all=True, append_images=[second], quality=95)
    picture = read_image(path, max_side=100)
    assert (picture.width, picture.height) == (800, 600)
    assert np.abs(picture.pixels - reduced(disc_picture(800, 600), 100, 75)).mean() < 3


@pytest.mark.parametrize("suffix", [".png", ".webp", ".bmp", ".tif"])
def test_other_formats_are_decoded_whole_and_then_scaled_down(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a{suffix}", disc_picture(1000, 620))
    with drafts() as sizes:
        picture = read_image(path, max_side=150)
    assert not sizes
    np.testing.assert_array_equal(picture.pixels, reduced(read_image(path).pixels, 150, 93))
    assert (picture.width, picture.height) == (1000, 620)


@pytest.mark.parametrize("max_side", [150, 151, None])
def test_a_jpeg_within_the_limit_keeps_every_pixel(photo: Path, max_side: int | None) -> None:
    with drafts() as sizes:
        pixels = read_image(photo, max_side=max_side).pixels
    assert not sizes
    with Image.open(photo) as image:
        np.testing.assert_array_equal(pixels, np.asarray(image))


@pytest.mark.parametrize(("max_side", "size"), [(None, (150, 110)), (30, (30, 22))])
def test_the_size_is_checked_before_a_file_is_decoded(photo: Path, max_side: int | None, size: tuple[int, int]) -> None:
    seen = []

    def refuse(width: int, height: int) -> None:
        seen.append((width, height))
        raise ImageError("too much for us")

    pixels = read_image(photo).pixels
    photo.write_bytes(photo.read_bytes()[:2000])  # the header alone: decoding would fail in another way
    with pytest.raises(ImageError, match=r"photo\.jpg: too much for us"):
        read_image(photo, max_side=max_side, check_size=refuse)
    with pytest.raises(ImageError, match="too much for us"):
        read_image(pixels, max_side=max_side, check_size=refuse)
    assert seen == [size, size]


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((3, 4, 5), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 3), np.int8),
        np.zeros((0, 4, 3), np.uint8),
    ],
    ids=lambda array: f"{array.shape}-{array.dtype}",
)
def test_other_arrays_are_refused_with_their_shape_and_dtype(array: np.ndarray) -> None:
    with pytest.raises(ImageError, match=r"expected an RGB array \(h, w, 3\) of uint8, got") as caught:
        read_image(array)
    assert str(array.shape) in str(caught.value)
    assert str(array.dtype) in str(caught.value)


def test_a_pil_image_without_pixels_is_refused() -> None:
    with pytest.raises(ImageError, match="at least one pixel, found 0x4"):
        read_image(Image.new("RGB", (0, 4)))


def test_a_truncated_pil_image_is_an_image_error(photo: Path) -> None:
    photo.write_bytes(photo.read_bytes()[:2000])
    with Image.open(photo) as image, pytest.raises(ImageError, match="truncated"):
        read_image(image)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"none\.jpg: no such file"):
        read_image(tmp_path / "none.jpg")


def test_a_name_too_long_for_the_system(tmp_path: Path) -> None:
    with pytest.raises(ImageError):
        read_image(tmp_path / ("x" * 5000))


def test_a_folder_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="expected an image file, found a folder"):
        read_image(tmp_path)


def test_text_named_like_an_image(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_text("not a picture")
    with pytest.raises(ImageError, match=r"a\.jpg: not a readable image"):
        read_image(path)


def test_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.touch()
    with pytest.raises(ImageError, match="empty file"):
        read_image(path)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".tif"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str, share: float) -> None:
    path = save(tmp_path / f"a{suffix}", np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ImageError, match="not a readable image"):
        read_image(path)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_adobe_deflate"}),
        ("GIF", {}),
        ("JPEG2000", {}),
    ],
)
def test_pixels_that_cannot_be_decoded_are_refused(kind: str, options: dict[str, str]) -> None:
    content = encoded(np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8), kind, **options)
    place = len(content) // 2
    broken = content[:place] + (bytes(50) + b"\xff" * 50 + content[place + 100 :] if kind != "JPEG2000" else b"")
    for source in (broken, Image.open(io.BytesIO(broken))):
        with pytest.raises(ImageError, match="not a readable image"):
            read_image(source)


def test_one_pixel(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", np.array([[[9, 8, 7]]], np.uint8))
    np.testing.assert_array_equal(read_image(path, max_side=1).pixels, [[[9, 8, 7]]])


def test_too_many_pixels_are_refused_before_decoding(tmp_path: Path) -> None:
    path = png_header(tmp_path / "a.png", 30_000, 30_000)
    with pytest.raises(ImageError, match=r"30000x30000 is 900,000,000 pixels.*limit of 200,000,000.*--max-pixels"):
        read_image(path)
    with pytest.raises(ImageError, match="not a readable image"):  # decoding was tried, and met no data
        read_image(path, max_pixels=900_000_000)


def test_the_pixel_limit_is_inclusive(tmp_path: Path, rgb: np.ndarray) -> None:
    path = save(tmp_path / "a.png", rgb)
    read_image(path, max_pixels=WIDTH * HEIGHT)
    with pytest.raises(ImageError, match="40x30 is 1,200 pixels"):
        read_image(path, max_pixels=WIDTH * HEIGHT - 1)


def test_pillows_own_limit_neither_applies_nor_changes(
    tmp_path: Path, rgb: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7)
    read_image(save(tmp_path / "a.png", rgb))
    with pytest.raises(ImageError):
        read_image(png_header(tmp_path / "b.png", 30_000, 30_000))
    with pytest.raises(ImageError):
        read_image(tmp_path / "none.png")
    assert Image.MAX_IMAGE_PIXELS == 7
    assert MAX_PIXELS == 200_000_000


def test_a_name_that_is_no_utf8(tmp_path: Path, rgb: np.ndarray) -> None:
    plain = save(tmp_path / "a.png", rgb)
    try:
        odd = plain.rename(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")))
    except OSError:
        pytest.skip("this file system wants UTF-8 names")
    np.testing.assert_array_equal(read_image(odd).pixels, rgb)


@pytest.mark.parametrize(
    ("height", "width", "grid"),
    [(1, 1, (1, 1)), (14, 14, (1, 1)), (15, 14, (2, 1)), (28, 29, (2, 3)), (110, 150, (8, 11))],
)
def test_patch_grid_counts_partial_patches(height: int, width: int, grid: tuple[int, int]) -> None:
    assert patch_grid(np.zeros((height, width, 3), np.uint8), 14) == grid


def test_patches_are_normalised_then_padded_with_zeros(rgb: np.ndarray) -> None:
    for pixels in (rgb, rgb[:29, :37], rgb[:28, :28], rgb[:1, :1]):
        height, width = pixels.shape[:2]
        cut = cut_patches(Picture(pixels, 400, 300), 14)
        assert (cut.size, cut.width, cut.height) == ((height, width), 400, 300)
        rows, columns = cut.grid
        (values,) = normalise_patches(torch.from_numpy(cut.patches)[None], [cut.size], MEAN, STD)
        assert values.dtype == torch.float32
        assert values.shape == (rows * columns, 14 * 14 * 3)
        image = values.view(rows, columns, 14, 14, 3).transpose(1, 2).reshape(rows * 14, columns * 14, 3).numpy()
        np.testing.assert_allclose(image[:height, :width], (pixels / 255 - np.array(MEAN)) / np.array(STD), atol=1e-5)
        assert (image[height:] == 0).all()
        assert (image[:, width:] == 0).all()


@given(arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))), st.integers(1, 5))
def test_each_patch_holds_its_own_pixels_and_zeros_beyond_the_image(pixels: np.ndarray, patch: int) -> None:
    cut = cut_patches(Picture(pixels, 9, 9), patch)
    assert cut.grid == patch_grid(pixels, patch)
    assert cut.patches.shape == (*cut.grid, patch, patch, 3)
    assert cut.patches.dtype == np.uint8
    assert cut.patches.flags.c_contiguous
    for row, column in np.ndindex(cut.grid):
        expected = np.zeros((patch, patch, 3), np.uint8)
        there = pixels[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
        expected[: there.shape[0], : there.shape[1]] = there
        np.testing.assert_array_equal(cut.patches[row, column], expected)


@pytest.mark.parametrize(("width", "height"), [(WIDTH, HEIGHT), (14, 28)])
def test_cutting_and_normalising_leave_the_pixels_alone(width: int, height: int) -> None:
    pixels = disc_picture(width, height)
    before = pixels.copy()
    cut = cut_patches(Picture(pixels, width, height), 14)
    normalise_patches(torch.from_numpy(cut.patches)[None], [cut.size], MEAN, STD)
    np.testing.assert_array_equal(pixels, before)


def test_formats_that_need_other_programs_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    Image.new("RGB", (20, 20)).save(path, format="EPS")
    with pytest.raises(ImageError, match="not a readable image"):
        read_image(path)


def test_a_multi_picture_jpeg_of_a_phone_gives_its_first_picture(tmp_path: Path) -> None:
    path = tmp_path / "phone.jpg"
    first, second = Image.new("RGB", (20, 10), "red"), Image.new("RGB", (20, 10), "blue")
    first.save(path, format="MPO", save_all=True, append_images=[second])
    pixels = read_image(path).pixels
    assert pixels.shape == (10, 20, 3)
    assert pixels[5, 5, 0] > 200 > 50 > pixels[5, 5, 2]


def test_a_large_tiff_is_read_up_to_our_limit_and_not_pillows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow checks TIFF once more when it decodes."""
    path = tmp_path / "large.tif"
    Image.new("1", (300, 200)).save(path, compression="group4")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert read_image(path).pixels.shape == (200, 300, 3)
    assert Image.MAX_IMAGE_PIXELS == 1000
    with pytest.raises(ImageError, match="more than the limit of 50,000"):
        read_image(path, max_pixels=50_000)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_orientation_is_applied_or_ignored_in_every_format(tmp_path: Path, suffix: str, orientation: int) -> None:
    stored = np.zeros((40, 90, 3), np.uint8)
    stored[:20, :45] = 255  # a white corner tells all eight apart
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned{suffix}"
    Image.fromarray(stored).save(path, exif=exif)
    plain = read_image(path, exif=False).pixels
    assert plain.shape == stored.shape
    assert np.abs(plain.astype(int) - stored).mean() < 8
    turned = read_image(path).pixels
    assert turned.shape[:2] == ((40, 90) if orientation < 5 else (90, 40))
    assert read_image(path, max_side=45).pixels.shape[:2] == ((20, 45) if orientation < 5 else (45, 20))
    assert read_image(path, max_side=45, exif=False).pixels.shape[:2] == (20, 45)
    corners = [turned[5, 5], turned[5, -5], turned[-5, -5], turned[-5, 5]]
    white = [int(corner.mean() > 128) for corner in corners]
    # Where row 0 and column 0 of the stored picture are seen, by the EXIF standard.
    assert white.index(1) == {1: 0, 2: 1, 3: 2, 4: 3, 5: 0, 6: 1, 7: 2, 8: 3}[orientation]
    assert sum(white) == 1


# Samples


@given(st.lists(st.text(), min_size=1, max_size=40), st.integers(1, 60), st.integers(0, 2**70))
def test_a_sample_is_a_part_of_the_images_in_their_order(images: list[str], count: int, seed: int) -> None:
    numbered = list(enumerate(images))
    drawn = draw_sample(numbered, count, seed)
    assert len(drawn) == min(count, len(images))
    assert [number for number, _ in drawn] == sorted({number for number, _ in drawn})
    assert all(numbered[number] == (number, image) for number, image in drawn)
    assert draw_sample(tuple(numbered), count, seed) == drawn


def test_samples_differ_by_seed_and_favour_no_image() -> None:
    draws = [draw_sample(range(10), 3, seed) for seed in range(600)]
    counts = np.bincount([number for drawn in draws for number in drawn], minlength=10)
    assert len({tuple(drawn) for drawn in draws}) > 100  # of 120
    assert 130 < counts.min() <= counts.max() < 230  # 180 each, with a deviation of 11


@pytest.mark.parametrize(
    ("images", "count", "seed", "message"),
    [
        ([], 1, 0, "expected at least one image"),
        ([1, 2], 0, 0, "sample must be an integer of at least 1, not 0"),
        ([1, 2], -1, 0, "sample must be an integer of at least 1, not -1"),
        ([1, 2], 1, -1, "seed must be an integer of at least 0, not -1"),
    ],
)
def test_samples_of_nothing_are_refused(images: list[int], count: int, seed: int, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        draw_sample(images, count, seed)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([8, 14, 16]))
def test_patches_become_the_image_again(height: int, width: int, patch: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    assert np.array_equal(cut_patches(Picture(pixels, width, height), patch).pixels, pixels)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError, match="expected an image file, found a special file"):
        read_image(tmp_path / "pipe.jpg")


# What stands for an image


class Entry:
    """A path of somebody's own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


def sources(path: Path) -> dict[str, object]:
    pixels = np.array(Image.open(path))
    (entry,) = os.scandir(path.parent)
    written = io.BytesIO()
    Image.open(path).save(written, "PNG")
    return {
        "str": str(path),
        "path": path,
        "path-like": Entry(path),
        "DirEntry": entry,
        "bytes": path.read_bytes(),
        "bytearray": bytearray(path.read_bytes()),
        "memoryview": memoryview(path.read_bytes()),
        "BytesIO": io.BytesIO(path.read_bytes()),
        "BytesIO at its end": written,
        "open file": path.open("rb"),
        "PIL": Image.open(path),
        "array": pixels,
        "tensor CHW": torch.from_numpy(pixels).permute(2, 0, 1),
        "tensor HWC": torch.from_numpy(pixels),
        "as stored": ImageFile(path, exif=False),
    }


def test_an_image_comes_in_many_forms(tmp_path: Path, rgb: np.ndarray) -> None:
    path = save(tmp_path / "a.png", rgb)
    for kind, source in sources(path).items():
        np.testing.assert_array_equal(read_image(source).pixels, rgb, err_msg=kind)
        np.testing.assert_array_equal(np.array(Image.open(path)), rgb)  # nothing was written to


def test_a_tensor_of_three_rows_is_channels_first() -> None:
    tensor = torch.randint(0, 255, (3, 5, 3), dtype=torch.uint8)
    np.testing.assert_array_equal(read_image(tensor).pixels, tensor.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("source", [None, 3, 2.5, ["a.jpg"], {"path": "a.jpg"}, object(), io.StringIO("text")])
def test_what_is_no_image_is_told_what_is_expected(source: object) -> None:
    with pytest.raises(ImageError, match=r"expected an image: a path, a file object .*, got (?!.*0x)"):
        read_image(source)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(3, 4, 4), torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.uint8)],
    ids=lambda tensor: str(tuple(tensor.shape)),
)
def test_other_tensors_are_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(ImageError, match=r"expected an RGB tensor \(3, h, w\) or \(h, w, 3\) of uint8, got \("):
        read_image(tensor)


@pytest.mark.parametrize(("highest", "expected"), [(255, 200), (65535, 51400 // 257)])
def test_grey_integers_are_of_eight_or_sixteen_bits(highest: int, expected: int) -> None:
    grey = np.array([[0, 200 if highest == 255 else 51400], [highest, 0]], np.int32)
    assert read_image(Image.fromarray(grey)).pixels[:, :, 0].tolist() == [[0, expected], [255, 0]]


def test_a_dark_sixteen_bit_pgm_stays_dark(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 65535\n" + struct.pack(">HH", 200, 255))
    assert read_image(tmp_path / "a.pgm").pixels[0, :, 0].tolist() == [0, 0]


def test_every_ending_that_pillow_knows_of_these_formats_is_an_image() -> None:
    Image.init()
    formats = {*_FORMATS, "MPO"}
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in formats}
    assert endings <= set(SUFFIXES)
    assert set(SUFFIXES) - endings <= set(HEIF_SUFFIXES)


@pytest.mark.parametrize("suffix", [".gif", ".avif", ".jp2", ".ppm", ".jfif", ".apng"])
def test_further_formats(tmp_path: Path, rgb: np.ndarray, suffix: str) -> None:
    pixels = read_image(save(tmp_path / f"a{suffix}", rgb, **({"quality": 95} if suffix == ".avif" else {}))).pixels
    assert pixels.shape == rgb.shape
    assert np.abs(pixels.astype(int) - rgb).mean() < 8


def test_the_first_of_several_frames_is_read(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    for suffix in (".gif", ".png", ".tif", ".webp"):
        frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:])
        assert np.abs(read_image(tmp_path / f"a{suffix}").pixels.astype(int) - (255, 0, 0)).max() < 4


# Memory and the system


def test_what_needs_more_memory_than_is_free_is_refused_with_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    Image.new("RGBA", (9000, 8000), "red").save(path, compress_level=1)
    assert read_image(path, max_side=10).pixels.shape == (9, 10, 3)
    monkeypatch.setattr("lostreg.images.decode.host_bytes", lambda: 300_000_000)
    with pytest.raises(
        ImageUnavailableError, match=r"a\.png: 9000x8000 pixels of mode RGBA in PNG take up to 0.5 GB.*0.3 GB are free"
    ):
        read_image(path, max_side=10)
    Image.new("RGB", (9000, 8000), "red").save(tmp_path / "a.jpg")  # decoded at an eighth
    assert read_image(tmp_path / "a.jpg", max_side=1000).pixels.shape == (889, 1000, 3)
    monkeypatch.setattr("lostreg.images.decode.host_bytes", lambda: None)  # the system does not say
    assert read_image(path, max_side=10).pixels.shape == (9, 10, 3)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize("mode", ["RGBA", "RGB", "L", "I;16"])
def test_decoding_takes_no_more_than_was_counted(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.png"
    Image.new(mode, (7000, 6000)).save(path, compress_level=1)
    code = (
        "import sys, resource; from lostreg.images import decode; from pathlib import Path\n"
        "def peak(): return int([l for l in open('/proc/self/status') if 'VmHWM' in l][0].split()[1]) * 1024\n"
        "counted = []; real = decode._check_memory\n"
        "decode._check_memory = lambda needed, *rest: counted.append(needed) or real(needed, *rest)\n"
        "before = peak(); decode.read_image(Path(sys.argv[1]), max_side=64); print(peak() - before, max(counted))"
    )
    told = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    taken, counted = map(int, told.split())
    assert 0.3 * counted < taken < counted + 80_000_000  # bands, and what is loaded on the way


@pytest.mark.parametrize(
    ("mode", "kind", "options", "bytes_a_pixel"),  # of Pillow's image, RGB, a copy of it, and the decoder's own
    [
        ("RGB", "JPEG", {}, 4 + 3 + 3),
        ("RGB", "JPEG", {"progressive": True}, 4 + 3 + 3 + 6),  # 16 bits of each channel, until the last scan
        ("CMYK", "JPEG", {"progressive": True}, 4 + 3 + 3 + 8),
        ("RGBA", "JPEG2000", {}, 4 + 3 + 3 + 24),
    ],
)
def test_what_decoders_take_besides_is_counted(
    monkeypatch: pytest.MonkeyPatch, mode: str, kind: str, options: dict[str, object], bytes_a_pixel: int
) -> None:
    content = io.BytesIO()
    Image.new(mode, (640, 480)).save(content, kind, **options)
    monkeypatch.setattr("lostreg.images.decode._LARGE_BYTES", 0)
    monkeypatch.setattr("lostreg.images.decode.host_bytes", lambda: bytes_a_pixel * 640 * 480)  # and the file itself
    with pytest.raises(ImageUnavailableError, match="640x480 pixels of mode"):
        read_image(content.getvalue())


def raising(error: BaseException) -> Callable[..., object]:
    def fail(*_: object, **__: object) -> object:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (MemoryError(), ImageUnavailableError, "not enough memory"),
        (OSError(errno.EIO, "Input/output error"), ImageUnavailableError, r"cannot be read \(Input/output error\)"),
        (PermissionError(errno.EACCES, "Permission denied"), ImageUnavailableError, "cannot be read"),
        (OSError(errno.ENFILE, "Too many open files"), ImageUnavailableError, "Too many open files"),
        (FileNotFoundError(errno.ENOENT, "No such file"), ImageUnavailableError, "no such file"),
        (OSError("image file is truncated"), ImageError, r"not a readable image \(image file is truncated\)"),
        (AttributeError("'float' object has no attribute"), ImageError, "not a readable image"),
        (RecursionError("too deep"), ImageError, "not a readable image"),
        (KeyError("tag"), ImageError, "not a readable image"),
        (ZeroDivisionError(), ImageError, r"not a readable image \(ZeroDivisionError\)"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("place", ["PIL.Image.open", "PIL.ImageFile.ImageFile.load"])
def test_whatever_a_decoder_raises_is_that_images_failure(
    photo: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception, kind: type[ImageError], message: str
) -> None:
    monkeypatch.setattr(place, raising(error))
    with pytest.raises(ImageError, match=message) as caught:
        read_image(photo)
    assert type(caught.value) is kind
    assert str(caught.value).startswith(f"{photo}: ")


def test_an_interrupt_is_no_images_failure(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.Image.open", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        read_image(photo)


@pytest.mark.parametrize("size", [10, 3000])
def test_a_header_is_that_of_the_decoded_image(tmp_path: Path, size: int) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (size // 2, size, 3), dtype=np.uint8)  # longer than what is read
    for suffix in (".jpg", ".png", ".webp", ".tif", ".bmp"):
        exif = Image.Exif()
        exif[0x112] = 6
        path = save(tmp_path / f"a{suffix}", noise, exif=exif)
        header = read_header(path)
        assert header.size(exif=False) == (size, size // 2)
        assert header.size(exif=True) == ((size // 2, size) if suffix != ".bmp" else (size, size // 2))
        picture = read_image(path)
        assert header.size(exif=True) == (picture.width, picture.height)
