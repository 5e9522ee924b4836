"""Sound files made unsound: whatever is drawn comes from the generator given, so that a seed says it all."""

import contextlib
import io
import json
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final

from PIL import ExifTags, Image

Mutation = Callable[[Random, Sequence[bytes]], bytes]

# As a JSON file may have them, also what Python's parser takes and JSON does not know.
_VALUES: Final = (
    *("null", "true", "false", "0", "-1", "1", "0.5", "-0.0", "1e39", "1e308", "-1e400", "NaN", "Infinity"),
    *("255", "65536", "2147483648", "4294967296", "9223372036854775808", "1" + "0" * 30, "9" * 400, "9" * 5000),
    *('""', '" "', '"\\u0000"', '"\\ud800"', '"../up.jpg"', '"/"', '"\\n"', '"1"', '"' + "x" * 300 + '"'),
    *("[]", "{}", "[[]]", "[null]", "[1, 2, 3]", '{"a": 1}', "[" * 5000 + "]" * 5000),
)
_WORDS: Final = (
    b"\0",
    b"\xff",
    b"\x80",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\0\0\0\0",
    b"\r\n",
    b"\xef\xbb\xbf",
)


def mutate_bytes(rng: Random, sources: Sequence[bytes]) -> bytes:
    """One to four of: bits flipped, bytes overwritten, cut out, repeated, put in, the end cut off, two files joined."""
    content = bytearray(rng.choice(sources))
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(min(len(content), 64) if rng.random() < 0.4 else len(content)) if content else 0
        span = rng.choice((1, 1, 2, 4, 16, 200))
        match rng.randrange(7):
            case 0 if content:
                content[at] ^= 1 << rng.randrange(8)
            case 1:
                content[at : at + span] = rng.randbytes(span)
            case 2:
                del content[at : at + span]
            case 3:
                content[at:at] = content[at : at + span] * rng.choice((1, 2, 50))
            case 4:
                word = rng.choice(_WORDS)
                content[at : at + len(word) * rng.randrange(2)] = word
            case 5:
                del content[at:]
            case 6:
                other = rng.choice(sources)
                content[at:] = other[rng.randrange(len(other) + 1) :]
    return bytes(content)


def mutate_image(rng: Random, sources: Sequence[bytes]) -> bytes:
    """Bytes; mostly the checksums of a PNG are set right again, without which its reader looks no further."""
    content = mutate_bytes(rng, sources)
    return _mend_png(content) if content.startswith(b"\x89PNG") and rng.random() < 0.8 else content


def mutate_json(rng: Random, sources: Sequence[bytes]) -> bytes:
    """A value of the document replaced, left out, repeated, moved or renamed; sometimes bytes as well."""
    document = json.loads(rng.choice(sources))
    raw: list[str] = []
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        document = _change(rng, document, raw)
    text = json.dumps(document)
    text = re.sub(r'"@(\d+)@"', lambda found: raw[int(found[1])], text)
    content = text.encode()
    return mutate_bytes(rng, [content]) if rng.random() < 0.2 else content


def mutate_lines(rng: Random, sources: Sequence[bytes]) -> bytes:
    """JSON Lines: one line mutated; sometimes bytes of the file, or lines left out, repeated or not ended."""
    lines = rng.choice(sources).splitlines()
    at = rng.randrange(len(lines))
    lines[at] = mutate_json(rng, [lines[at]])
    if rng.random() < 0.2:
        lines.insert(rng.randrange(len(lines)), rng.choice(lines))
    content = b"\n".join(lines) + rng.choice((b"\n", b"\n", b"", b"\n\n"))
    return mutate_bytes(rng, [content]) if rng.random() < 0.2 else content


def mutate_xml(rng: Random, sources: Sequence[bytes]) -> bytes:
    """A tag or a text replaced, left out or repeated; sometimes bytes as well."""
    parts = re.split(rb"(<[^>]*>)", rng.choice(sources))
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(parts))
        match rng.randrange(4):
            case 0:
                parts[at] = rng.choice(_VALUES).strip('"').encode()
            case 1:
                parts[at] = b""
            case 2:
                parts.insert(rng.randrange(len(parts)), parts[at] * rng.choice((1, 3000)))
            case 3:
                parts[at] = rng.choice(_MARKUP)
    content = b"".join(parts)
    return mutate_bytes(rng, [content]) if rng.random() < 0.3 else content


_MARKUP: Final = (
    b'<?xml version="1.0" encoding="UTF-16"?>',
    b'<?xml version="1.0" encoding="nothing"?>',
    b'<!DOCTYPE a [<!ENTITY b "' + b"x" * 100 + b'"><!ENTITY c "' + b"&b;" * 100 + b'">]>',
    b"&c;&c;&c;",
    b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/hostname">]>',
    b"&b;",
    b"&#0;",
    b"&#xD800;",
    b"<![CDATA[",
    b"<object/>",
    b"<bndbox/>",
    "\u0661\uff12\u00b2".encode(),
)


def mutate_safetensors(rng: Random, sources: Sequence[bytes]) -> bytes:
    """Half the time the header alone, as JSON, its length told rightly."""
    content = rng.choice(sources)
    if rng.random() < 0.5:
        return mutate_bytes(rng, [content])
    (length,) = struct.unpack("<Q", content[:8])
    header = mutate_json(rng, [content[8 : 8 + length]])
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def mutate_torch(rng: Random, sources: Sequence[bytes]) -> bytes:
    """Half the time one record of the zip archive alone, its checksum told rightly."""
    content = rng.choice(sources)
    if rng.random() < 0.5 or not content.startswith(b"PK"):
        return mutate_bytes(rng, [content])
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(buffer, "w") as target:
        names = source.namelist()
        chosen = next(name for name in names if name.endswith("data.pkl")) if rng.random() < 0.7 else rng.choice(names)
        for name in names:
            record = source.read(name)
            target.writestr(name, mutate_bytes(rng, [record]) if name == chosen else record)
    return buffer.getvalue()


def random_tar(rng: Random, sources: Sequence[bytes]) -> bytes:
    """Some entries of any name, kind, link, rights and size; sometimes bytes mutated as well."""
    buffer = io.BytesIO()
    form = rng.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for _ in range(rng.randrange(6)):
            entry = tarfile.TarInfo(rng.choice(_NAMES))
            entry.type = rng.choice((tarfile.REGTYPE,) * 6 + _KINDS)
            entry.linkname, entry.mode = rng.choice(_NAMES), rng.choice((0o644, 0, 0o7777))
            content = rng.randbytes(rng.choice((0, 3, 600)))
            entry.size = len(content) if entry.isreg() else 0
            with contextlib.suppress(ValueError):  # too long a name for the form
                tar.addfile(entry, io.BytesIO(content))
    content = buffer.getvalue()
    return mutate_bytes(rng, [content, *sources]) if rng.random() < 0.4 else content


_KINDS: Final = (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.CONTTYPE)
_NAMES: Final = (
    *("VOCdevkit/a.jpg", "VOCdevkit", "VOCdevkit/link", "VOCdevkit/link/b.jpg", "VOCdevkit/a.jpg/c", "d/", "."),
    *("../up", "/absolute", "VOCdevkit/../../up", "C:/up", "a\\..\\up", "..", "", "e" * 300, "\udce4\n\x1b[1m", "/"),
    *("f/" * 60 + "g", "~/h", "./VOCdevkit/./i", "//j", ".fetch-voc12.lock"),
)


def with_random_exif(rng: Random, sources: Sequence[bytes]) -> bytes:
    """A sound picture, its pixels as they were, with an EXIF block of any tags, types, counts, offsets and order."""
    content = rng.choice(sources)
    if not content.startswith(b"\xff\xd8"):
        buffer = io.BytesIO()
        with Image.open(io.BytesIO(content)) as image:
            image.save(buffer, image.format, lossless=True, exif=b"Exif\0\0" + _exif(rng))
        return buffer.getvalue()
    segments = b""
    for _ in range(rng.choice((1, 1, 1, 2))):
        block = rng.choice((b"Exif\0\0", b"Exif\0\0", b"Exif\0\xff", b"")) + _exif(rng)
        segments += b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block
    return content[:2] + segments + content[2:]


_TAGS: Final = (ExifTags.Base.Orientation,) * 6 + (
    *(ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo, ExifTags.IFD.Interop, ExifTags.IFD.MakerNote, ExifTags.Base.ImageWidth),
    *(ExifTags.Base.XResolution, ExifTags.Base.DateTime, ExifTags.Base.Make, ExifTags.Base.JpegIFOffset, 0x014A, 700),
)


def _exif(rng: Random) -> bytes:
    order = rng.choice("<>")
    entries = b""
    count = rng.choice((0, 1, 1, 2, 5, 40))
    for _ in range(count):
        tag = rng.choice(_TAGS) if rng.random() < 0.9 else rng.randrange(1 << 16)
        kind = rng.randrange(14) if rng.random() < 0.9 else rng.randrange(1 << 16)
        number = rng.choice((0, 1, 1, 1, 2, 4, 9, 1000, 1 << 31, (1 << 32) - 1))
        value = rng.choice((*range(10), 26, 8, rng.randrange(300), 1 << 16, 6 << 16, 1 << 31, (1 << 32) - 1))
        entries += struct.pack(order + "HHII", tag, kind, number, value)
    told = count if rng.random() < 0.8 else rng.choice((0, count + 1, 0xFFFF))
    head = (b"II" if order == "<" else b"MM") if rng.random() < 0.95 else rng.choice((b"\0\0", b"IM"))
    start = rng.choice((8, 8, 8, 8, 0, 9, 1 << 31, (1 << 32) - 1))
    magic = 42 if rng.random() < 0.95 else rng.choice((43, 0, 0x4F52))
    following = rng.choice((0, 0, 8, rng.randrange(300), (1 << 32) - 1))
    block = head + struct.pack(order + "HI", magic, start) + struct.pack(order + "H", told) + entries
    block += struct.pack(order + "I", following) + rng.randbytes(rng.choice((0, 8, 100)))
    return block[: rng.randrange(len(block))] if rng.random() < 0.1 else block


def _mend_png(content: bytes) -> bytes:
    mended, at = content[:8], 8
    while at + 12 <= len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        body = content[at + 4 : at + 8 + length]
        mended += content[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return mended


def _change(rng: Random, document: Any, raw: list[str]) -> Any:
    """The document with one change, in a place that is as likely deep as shallow."""
    if isinstance(document, dict | list) and document and rng.random() < 0.85:
        keys = list(document) if isinstance(document, dict) else list(range(len(document)))
        key = rng.choice(keys)
        if rng.random() < 0.7:
            document[key] = _change(rng, document[key], raw)
            return document
        other = document[rng.choice(keys)]
        match rng.randrange(4):
            case 0:
                del document[key]
            case 1:
                document[key] = other
            case 2 if isinstance(document, list):
                document.insert(key, other)
            case 2:
                document[rng.choice(("", "id", "extra", f"{key}s"))] = other
            case 3:
                document[key] = [document[key]]
        return document
    if type(document) in (int, float) and rng.random() < 0.4:
        return rng.choice((-document, document * 10, document + 0.5, document * 1000, str(document)))
    raw.append(rng.choice(_VALUES))
    return f"@{len(raw) - 1}@"
