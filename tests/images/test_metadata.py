"""Metadata never decide whether pixels are read; the orientation is the one that OpenCV sees."""

import contextlib
import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from fabricate import encoded, exif_block, png_chunk, turned_block, with_exif
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, TiffImagePlugin

from lostreg.errors import ImageError, ImageUnavailableError
from lostreg.images.decode import read_image
from lostreg.images.metadata import Orientation, exif_orientation, hide_metadata, turn

PIXELS = cv2.resize(np.random.default_rng(0).integers(0, 255, (6, 10, 3), dtype=np.uint8), (40, 24))
CONTENTS = {kind: encoded(PIXELS, kind, quality=90) for kind in ("JPEG", "PNG")}


# Older ones turn no WebP, and look for a second EXIF segment in no JPEG.
OPENCV_LOOKS_EVERYWHERE = tuple(map(int, cv2.__version__.split(".")[:2])) >= (4, 13)


def as_opencv_sees_it(content: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]


TAGS = st.tuples(
    st.sampled_from([0x10E, 0x10F, 0x110, 0x112, 0x112, 0x11A, 0x11B, 0x128, 0x131, 0x13E, 0x13F, 0x211, 0x214, 0x8769])
    | st.integers(0, 0xFFFF),
    st.sampled_from([1, 2, 3, 4, 5, 7, 9, 10, 11, 12, 13, 0, 99]),
    st.sampled_from([0, 1, 2, 4, 5, 20, 1000, 2**31, 2**32 - 1]),
    st.integers(0, 9).map(lambda value: struct.pack("<HH", value, 0))
    | st.integers(0, 9).map(lambda value: struct.pack(">HH", value, 0))
    | st.integers(0, 200).map(lambda value: struct.pack("<I", value))
    | st.binary(min_size=4, max_size=4),
)
BLOCKS = st.builds(
    lambda tags, order, count, rest, cut: (exif_block(*tags, order=order, count=count) + rest)[: cut or None],
    st.lists(TAGS, max_size=6),
    st.sampled_from("<>"),
    st.none() | st.integers(0, 0xFFFF),
    st.binary(max_size=40),
    st.just(0) | st.integers(1, 60),
)


@given(st.sampled_from(sorted(CONTENTS)), BLOCKS)
@settings(deadline=None, max_examples=300)
def test_any_exif_block_leaves_the_pixels_and_is_understood_as_by_opencv(kind: str, block: bytes) -> None:
    content = with_exif(CONTENTS[kind], block)
    np.testing.assert_array_equal(read_image(content).pixels, as_opencv_sees_it(content))
    np.testing.assert_array_equal(read_image(content, exif=False).pixels, read_image(CONTENTS[kind]).pixels)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [1, 2, 3, 4, 5, 9, 0, 99])
@pytest.mark.parametrize("value", [b"\6\0\0\0", b"\0\6\0\0", b"\0\0\0\6", b"6\0\0\0"])
def test_an_orientation_of_any_type_is_read_as_opencv_reads_it(order: str, kind: int, value: bytes) -> None:
    content = with_exif(CONTENTS["JPEG"], exif_block((0x112, kind, 1, value), order=order))
    np.testing.assert_array_equal(read_image(content).pixels, as_opencv_sees_it(content))


@pytest.mark.parametrize(
    ("first", "second", "value"), [(6, 1, 6), (1, 6, 1), (None, 8, 8), (6, None, 6), (9, 6, 1)], ids=str
)
def test_of_several_exif_segments_the_first_that_tells_counts(
    first: int | None, second: int | None, value: int
) -> None:
    blocks = [exif_block() if one is None else turned_block(one) for one in (first, second)]
    content = with_exif(CONTENTS["JPEG"], *blocks)
    np.testing.assert_array_equal(read_image(content).pixels, turn(read_image(CONTENTS["JPEG"]).pixels, value))
    if OPENCV_LOOKS_EVERYWHERE:
        np.testing.assert_array_equal(read_image(content).pixels, as_opencv_sees_it(content))


@pytest.mark.parametrize("between", [b"\0", b"AA", b"\xff\xff", b"\xff\0\x12", b"\xff\1", b"\xff\xd0"])
def test_what_stands_between_the_segments_of_a_jpeg_is_skipped(between: bytes) -> None:
    after = CONTENTS["JPEG"].index(b"\xff\xdb")  # the first table
    turned = with_exif(CONTENTS["JPEG"][:2] + CONTENTS["JPEG"][after:], turned_block(6))
    content = CONTENTS["JPEG"][:after] + between + turned[2:]
    np.testing.assert_array_equal(read_image(content).pixels, turn(read_image(CONTENTS["JPEG"]).pixels, 6))
    np.testing.assert_array_equal(read_image(content).pixels, as_opencv_sees_it(content))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turning_is_pillows(orientation: int) -> None:
    image = Image.fromarray(PIXELS)
    image.getexif()[0x112] = orientation
    np.testing.assert_array_equal(turn(PIXELS, orientation), np.asarray(ImageOps.exif_transpose(image)))


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (turned_block(6), Orientation(6, is_plain=True)),
        (turned_block(8, ">"), Orientation(8, is_plain=True)),
        (b"Exif\0\0" + turned_block(3), None),
        (exif_block((0x112, 1, 1, b"\6\0\0\0")), Orientation(6, is_plain=False)),
        (exif_block((0x112, 3, 2, b"\6\0\6\0")), Orientation(6, is_plain=False)),
        (exif_block((0x112, 3, 1, b"\6\0\0\0"), (0x112, 3, 1, b"\1\0\0\0")), Orientation(6, is_plain=False)),
        (turned_block(6)[:-6], Orientation(6, is_plain=True)),
        (exif_block((0x112, 3, 1, b"\6\0\0\0"), (0x11A, 2, 9, b"\xff\xff\0\0")), Orientation(6, is_plain=False)),
        (exif_block(), None),
        (b"", None),
        (b"no TIFF header", None),
    ],
)
def test_what_a_block_says_and_whether_all_readers_must_agree(block: bytes, expected: Orientation | None) -> None:
    assert exif_orientation(block) == expected


XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_xmp_turns_nothing(kind: str) -> None:
    if kind == "PNG":
        place = CONTENTS["PNG"].index(b"IDAT") - 4
        text = png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)
        content = CONTENTS["PNG"][:place] + text + CONTENTS["PNG"][place:]
    else:
        content = encoded(PIXELS, kind, xmp=XMP)
    assert Image.open(io.BytesIO(content)).getexif()[0x112] == 6  # Pillow would turn it
    assert read_image(content).pixels.shape == PIXELS.shape
    assert read_image(Image.open(io.BytesIO(content))).pixels.shape == PIXELS.shape


def webp_with(*chunks: bytes, flags: int = 0x08) -> bytes:
    """A WebP file with chunks after its pixels; its header announces EXIF."""
    header = b"VP8X" + struct.pack("<II", 10, flags) + struct.pack("<I", 39)[:3] + struct.pack("<I", 23)[:3]
    body = b"WEBP" + header + encoded(PIXELS, "WEBP", lossless=True)[12:] + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webp_exif(block: bytes) -> bytes:
    return b"EXIF" + struct.pack("<I", len(block)) + block


@pytest.mark.parametrize(
    ("content", "orientation"),
    [
        (webp_with(webp_exif(turned_block(6))), 6),
        (webp_with(webp_exif(turned_block(6)), flags=0), 1),  # not announced
        (webp_with(webp_exif(b"Exif\0\0" + turned_block(6))), 1),  # as JPEG alone has it
        (webp_with(webp_exif(b""), webp_exif(turned_block(6))), 1),  # the first alone counts
        (webp_with(webp_exif(turned_block(6) + b"odd") + b"\0"), 6),
        (webp_with(webp_exif(turned_block(6) + b"odd")), 1),  # its padding is missing
    ],
)
def test_webp_is_turned_where_opencv_turns_it(content: bytes, orientation: int) -> None:
    np.testing.assert_array_equal(read_image(content).pixels, turn(PIXELS, orientation))
    if OPENCV_LOOKS_EVERYWHERE:
        np.testing.assert_array_equal(read_image(content).pixels, as_opencv_sees_it(content))


def test_avif_is_turned_as_its_container_says_whatever_its_exif() -> None:
    content = encoded(PIXELS, "AVIF", exif=turned_block(6), quality=95)
    assert read_image(content).pixels.shape == (40, 24, 3)
    assert read_image(content, exif=False).pixels.shape == PIXELS.shape
    broken = encoded(PIXELS, "AVIF", exif=exif_block((0x11A, 2, 9, b"\xff\xff\0\0"), order="<"), quality=95)
    np.testing.assert_array_equal(read_image(broken).pixels, read_image(content, exif=False).pixels)


@pytest.mark.parametrize("orientation", [1, 6])
def test_heic_is_turned_by_its_decoder(orientation: int) -> None:
    heif = pytest.importorskip("pillow_heif")
    content = io.BytesIO()
    heif.from_pillow(Image.fromarray(PIXELS)).save(content, quality=95, exif=turned_block(orientation))
    pixels = read_image(content.getvalue()).pixels
    expected = turn(PIXELS, orientation)
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).mean() < 12


def png_with(*chunks: bytes, before: bytes = b"IDAT") -> bytes:
    place = CONTENTS["PNG"].index(before) - 4
    return CONTENTS["PNG"][:place] + b"".join(chunks) + CONTENTS["PNG"][place:]


BROKEN_TEXT = png_chunk(b"tEXt", b"Comment\0made")[:-1] + b"?"


@pytest.mark.parametrize(
    "content",
    [
        png_with(BROKEN_TEXT),
        png_with(BROKEN_TEXT, before=b"IEND"),
        png_with(png_chunk(b"tRNS", bytes(6))[:-1] + b"?"),  # libpng leaves it out, too
        png_with(png_chunk(b"zTXt", b"Comment\0\0no deflate")),
        png_with(png_chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(100_000)))),
        png_with(png_chunk(b"pHYs", b"12")),
        png_with(struct.pack(">I", 1 << 20) + b"tEXt" + bytes(30), before=b"IEND"),
        png_with(png_chunk(b"eXIf", turned_block())[:-1] + b"?"),  # a broken orientation is none
        png_with(png_chunk(b"eXIf", b"Exif\0\0" + turned_block())),  # as JPEG alone has it
        png_with(png_chunk(b"acTL", b"2")),
        png_with(png_chunk(b"acTL", bytes(8)), png_chunk(b"fcTL", b"0")),
        png_with(png_chunk(b"fcTL", struct.pack(">5I2H2B", 0, 400, 24, 0, 0, 1, 1, 0, 0))),
        png_with(png_chunk(b"fdAT", b"\0\0\0\1no picture")),
        CONTENTS["PNG"] + b"more",
    ],
)
def test_broken_chunks_beside_the_pixels_of_a_png_are_skipped(content: bytes) -> None:
    np.testing.assert_array_equal(read_image(content).pixels, PIXELS)


def tiff_with(order: str = "<", **tags: object) -> bytes:
    """A TIFF file whose directory is written by hand: Pillow checks types."""
    pixels = PIXELS.tobytes()
    entries = [
        (256, 4, 1, struct.pack(order + "I", 40)),
        (257, 4, 1, struct.pack(order + "I", 24)),
        (258, 3, 1, struct.pack(order + "HH", 8, 0)),
        (259, 3, 1, struct.pack(order + "HH", 1, 0)),
        (262, 3, 1, struct.pack(order + "HH", 2, 0)),
        (273, 4, 1, struct.pack(order + "I", 8)),
        (277, 3, 1, struct.pack(order + "HH", 3, 0)),
        (278, 4, 1, struct.pack(order + "I", 24)),
        (279, 4, 1, struct.pack(order + "I", len(pixels))),
        *((int(number[1:]), *tag) for number, tag in tags.items()),
    ]
    body = b"".join(struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in sorted(entries))
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(pixels))
    return head + pixels + struct.pack(order + "H", len(entries)) + body + bytes(4)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    "tags",
    [
        {},
        {"t700": (2, 4, b"abc\0")},  # XMP as text
        {"t282": (2, 4, b"abc\0"), "t283": (11, 1, b"abc\0"), "t296": (1, 1, b"\2\0\0\0")},  # resolution
        {"t271": (11, 1, b"abcd"), "t306": (99, 7, b"abcd")},
        {"t34665": (4, 1, b"\xff\xff\xff\xff")},  # EXIF beyond the end
        {"t34675": (7, 100, b"\0\0\0\1")},
    ],
)
def test_tags_beside_the_pixels_of_a_tiff_are_not_looked_at(order: str, tags: dict[str, object]) -> None:
    np.testing.assert_array_equal(read_image(tiff_with(order, **tags)).pixels, PIXELS)
    turned = {**tags, "t274": (3, 1, struct.pack(order + "HH", 6, 0))}
    np.testing.assert_array_equal(read_image(tiff_with(order, **turned)).pixels, turn(PIXELS, 6))
    np.testing.assert_array_equal(read_image(tiff_with(order, **turned), exif=False).pixels, PIXELS)


def test_a_tiff_may_end_with_its_directory() -> None:
    content = tiff_with(t274=(3, 1, struct.pack("<HH", 6, 0)), t700=(2, 4, b"abc\0"))[:-4]
    np.testing.assert_array_equal(read_image(content).pixels, turn(PIXELS, 6))
    np.testing.assert_array_equal(read_image(content).pixels, as_opencv_sees_it(content))
    np.testing.assert_array_equal(read_image(content, exif=False).pixels, PIXELS)
    np.testing.assert_array_equal(read_image(tiff_with()[:-4]).pixels, PIXELS)


def test_a_tile_larger_than_its_image_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lostreg.images.decode.host_bytes", lambda: 10**9)
    sides = {"t322": (4, 1, struct.pack("<I", 10_000)), "t323": (4, 1, struct.pack("<I", 20_000))}
    with pytest.raises(ImageUnavailableError, match=r"40x24 pixels of mode RGB in TIFF take up to 2\.8 GB"):
        read_image(tiff_with(**sides))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_that_pillow_has_opened_is_turned_once_or_not_at_all(orientation: int) -> None:
    content = tiff_with(t274=(3, 1, struct.pack("<HH", orientation, 0)), t700=(2, 4, b"abc\0"))
    for load in (False, True):
        for exif in (False, True):
            image = Image.open(io.BytesIO(content))
            if load:
                with contextlib.suppress(AttributeError):  # the text in place of XMP
                    image.load()
            if not (load and not exif):  # what has been turned says no more how it was
                expected = turn(PIXELS, orientation) if exif else PIXELS
                np.testing.assert_array_equal(read_image(image, exif=exif).pixels, expected)


def test_big_tiff_and_further_pages() -> None:
    content = io.BytesIO()
    page = Image.fromarray(PIXELS[::-1])
    Image.fromarray(PIXELS).save(content, "TIFF", save_all=True, append_images=[page], tiffinfo={274: 6}, big_tiff=True)
    np.testing.assert_array_equal(read_image(content.getvalue()).pixels, turn(PIXELS, 6))
    with content.getbuffer() as data:
        assert hide_metadata(data) == Orientation(6)
    with TiffImagePlugin.TiffImageFile(io.BytesIO(content.getvalue())) as image:
        assert image.n_frames == 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "GIF", "BMP"])
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_a_file_cut_anywhere_is_looked_at_without_a_fault(kind: str, data: st.DataObject) -> None:
    content = encoded(PIXELS, kind, **({} if kind in ("GIF", "BMP") else {"exif": turned_block()}))
    cut = bytearray(content[: data.draw(st.integers(0, len(content)))])
    hide_metadata(memoryview(cut))
    assert len(cut) <= len(content)


def test_heic_without_its_reader_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lostreg.images.decode.HAS_HEIF", False)
    with pytest.raises(ImageError, match=r'image: HEIC is read with pillow-heif: pip install "lostreg\[heif\]"'):
        read_image(b"\0\0\0\x18ftypheic" + bytes(40))
