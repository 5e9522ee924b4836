"""Which images shards, tables and stores stand for, and what they are called."""

import gzip
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fabricate_lake import HF, S3Server, struct_table, write_arrow, write_parquet, write_saved, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from lostreg.cli.files import unique_names
from lostreg.datasets import tables
from lostreg.datasets.folder import Collection, find_collection, find_images, find_sources
from lostreg.datasets.lake import stored_at
from lostreg.errors import ImageError, ImageUnavailableError, LostregWarning, OptionError
from lostreg.images import stores
from lostreg.images.stores import StoredImage

MEMBERS = {f"{number:03}.jpg": bytes([number]) * (300 * number) for number in range(1, 5)}


def bytes_of(collection: Collection) -> list[bytes]:
    return [bytes(image.read()) for image in collection if isinstance(image, StoredImage)]


# ----------------------------------------------------------------------------------------- several files


@pytest.fixture
def several(server: S3Server, tmp_path: Path) -> list[tuple[str, str]]:
    """A folder of this machine and one of a store, each as what stands in front of its names, and behind."""
    for number in (8, 9, 10, 11):
        path = write_tar(tmp_path / f"s/train/{number:03}.tar", {f"{number}.jpg": bytes([number])})
        server.put(f"braces/s/train/{path.name}", path.read_bytes())
    write_tar(tmp_path / "s/val/000.tar", {"0.jpg": b"0"})
    server.put("braces/s/val/000.tar", (tmp_path / "s/val/000.tar").read_bytes())
    path, mark, settings = server.uri("braces").partition("?")
    return [(f"{tmp_path}/", ""), (f"{path}/", mark + settings)]


def test_braces_stand_for_names_that_must_all_be_there(several: list[tuple[str, str]], tmp_path: Path) -> None:
    for front, behind in several:
        found = find_collection(f"{front}s/train/{{009..011}}.tar{behind}")
        assert found.names == ("009.tar/9.jpg", "010.tar/10.jpg", "011.tar/11.jpg")
        assert bytes_of(found) == [bytes([number]) for number in (9, 10, 11)]
        both = find_collection(f"{front}s/{{val,train}}/*0.tar{behind}")
        assert both.names == ("train/010.tar/10.jpg", "val/000.tar/0.jpg")
        with pytest.raises(OptionError, match=r"012\.tar: no such file, which .*\{010\.\.012\}\.tar stands for, too"):
            find_collection(f"{front}s/train/{{010..012}}.tar{behind}")
        images = find_sources([f"{front}s/train/{{008..009}}.tar{behind}"])
        assert [str(image) for image in images] == [
            f"{front}s/train/{name}" for name in ("008.tar/8.jpg", "009.tar/9.jpg")
        ]
    for pattern in ("{9..1}.tar", "{0..9999999}.tar", "{0..999}{0..999}{0..999}.tar"):
        with pytest.raises(OptionError, match=r"expected \{LOW\.\.HIGH\} or \{A,B\} for at most 1,000,000 names"):
            find_collection(str(tmp_path / pattern))
    write_tar(tmp_path / "{0..9}.tar", {"a.jpg": b"1"})  # what is there is meant
    assert find_collection(str(tmp_path / "{0..9}.tar")).names == ("{0..9}.tar/a.jpg",)


def test_a_list_may_name_shards_and_tables(several: list[tuple[str, str]], tmp_path: Path) -> None:
    (_, _), (front, behind) = several
    write_parquet(tmp_path / "t.parquet", struct_table({"a.jpg": b"a", "b.jpg": b"b"}))
    listed = tmp_path / "s/list.txt"
    listed.write_text(f"val/000.tar\n{front}s/train/010.tar{behind}\n{tmp_path}/t.parquet\nval/000.tar\n")
    found = find_collection(str(listed))
    assert found.names == (
        "val/000.tar/0.jpg",
        f"{front}s/train/010.tar/10.jpg",
        f"{tmp_path}/t.parquet/a.jpg",
        f"{tmp_path}/t.parquet/b.jpg",
    )
    assert bytes_of(found) == [b"0", bytes([10]), b"a", b"b"]
    assert [found.source(name) for name in found.names] == list(found)
    for line, message in {
        "a.jpg": "lists a.jpg beside files that hold many images",
        "val/1.tar": "no such file",
    }.items():
        listed.write_text(f"val/000.tar\n{line}\n")
        with pytest.raises(OptionError, match=message):
            find_collection(str(listed))


# ------------------------------------------------------------------------------------------------ shards


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_shard_stands_for_its_images_in_their_order(tmp_path: Path, form: int) -> None:
    long = "a folder/" * 9 + "photo.JPG"
    members = {"./b.jpg": b"1", "a.jpg": b"22", long: b"333", "b.json": b"{}", "b.cls": b"", "a.JSON": b"[]"}
    write_tar(tmp_path / "0.tar", members, form)
    with pytest.warns(LostregWarning, match=r"left out of .*0.tar, by their endings: 2 .json, 1 .cls$"):
        found = find_collection(str(tmp_path / "0.tar"))
    assert found.names == ("0.tar/b.jpg", "0.tar/a.jpg", f"0.tar/{long}")
    assert bytes_of(found) == [b"1", b"22", b"333"]
    assert [found.source(name) for name in found.names] == list(found)
    assert (found.root, find_collection(str(tmp_path)).root) == (tmp_path / "0.tar", tmp_path)


def test_of_links_and_members_of_one_name_the_first_file_counts_and_what_is_none_is_told(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, kind in (
            ("folder.jpg", tarfile.DIRTYPE),
            ("link.jpg", tarfile.SYMTYPE),
            ("link.txt", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),  # to what comes later
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.jpg"
            tar.addfile(member)
        for name, content in (("a.jpg", b"first"), ("a.jpg", b"again"), ("/./a.jpg", b"again"), ("x/..//a.jpg", b"3")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        member = tarfile.TarInfo("late.jpg")
        member.type, member.linkname = tarfile.LNKTYPE, "./a.jpg"
        tar.addfile(member)
    with pytest.warns(LostregWarning, match=r"by their endings: 2 .jpg \(no file of its own\)$"):
        found = find_collection(str(tmp_path / "0.tar"))
    assert found.names == ("0.tar/a.jpg", "0.tar/x/../a.jpg", "0.tar/late.jpg")
    assert bytes_of(found) == [b"first", b"3", b"first"]


def test_a_sparse_member_and_a_second_archive_are_told(tmp_path: Path) -> None:
    headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "1", "GNU.sparse.numblocks": "1"}
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, pax in (("a.jpg", {}), ("sparse.jpg", headers)):
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = 1, pax
            tar.addfile(member, io.BytesIO(b"1"))
    both = tmp_path / "both.tar"
    both.write_bytes((tmp_path / "a.tar").read_bytes() + write_tar(tmp_path / "b.tar", MEMBERS).read_bytes())
    with pytest.warns(LostregWarning) as told:
        assert find_collection(str(both)).names == ("both.tar/a.jpg",)
    assert "behind 1 images (more behind its end mark" in str(told[0].message)
    assert str(told[1].message).endswith("by their endings: 1 .jpg (sparse)")


@given(cut=st.integers(1, 10239))
@settings(max_examples=60, deadline=None)
def test_what_lies_before_a_cut_counts_and_the_cut_is_told(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write_tar(tmp_path_factory.mktemp("cut") / "0.tar", MEMBERS, tarfile.USTAR_FORMAT)
    content = path.read_bytes()
    assert len(content) == 10240
    ends = []
    with tarfile.open(path) as tar:
        ends = [(member.name, member.offset_data + member.size) for member in tar]
    path.write_bytes(content[:cut])
    whole = tuple(f"0.tar/{name}" for name, end in ends if end <= cut)
    last = -(-ends[-1][1] // 512) * 512
    if not whole:
        with pytest.raises(OptionError, match=r"no images in|expected a plain tar file|is cut off"):
            find_collection(str(path))
    elif cut >= last + 512:  # the mark of the end is there
        assert find_collection(str(path)).names == whole
    else:
        with pytest.warns(LostregWarning, match=f"0.tar is cut off or damaged behind {len(whole)} images"):
            assert find_collection(str(path)).names == whole


def test_a_shard_that_is_none_is_refused_in_a_line(tmp_path: Path) -> None:
    write_tar(tmp_path / "a" / "sound.tar", MEMBERS)
    (tmp_path / "a" / "packed.tar").write_bytes(gzip.compress((tmp_path / "a" / "sound.tar").read_bytes()))
    with pytest.raises(OptionError, match=r"^packed.tar: expected a plain tar file \(it is packed with gzip"):
        find_collection(str(tmp_path / "a"))
    (tmp_path / "text.tar").write_text("no tar" * 200)
    with pytest.raises(OptionError, match=r"text.tar: expected a plain tar file \(invalid header"):
        find_collection(str(tmp_path / "text.tar"))


def test_a_shard_that_changed_since_it_was_listed_is_unavailable(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", MEMBERS)
    found = find_collection(str(path))
    path.write_bytes(path.read_bytes()[:2048])
    with pytest.raises(ImageUnavailableError, match=r"^0.tar/004.jpg: cannot be read \(its file has changed"):
        found[-1].read()  # type: ignore[union-attr]
    path.unlink()
    with pytest.raises(ImageUnavailableError, match=r"^0.tar/004.jpg: it is not there any more$"):
        found[-1].read()  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------ tables


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"picture": HF, "key": pa.string()}, "picture"),
        ({"picture": pa.struct({"bytes": pa.large_binary()}), "thumb": pa.binary()}, "picture"),
        ({"whatever": pa.binary(), "key": pa.string()}, "whatever"),
        ({"mask": pa.binary(), "jpg": pa.large_binary()}, "jpg"),
        ({"mask": HF, "image": HF}, "image"),
        ({"image": HF, "bytes": pa.binary()}, "image"),
        ({"image": pa.binary(), "audio": HF}, "image"),
        ({"left": pa.binary(), "right": pa.binary()}, r"found left \(binary\), right \(binary\)"),
        ({"left": HF, "right": HF}, r"found left \(struct"),
        ({"image": pa.string()}, r"found image \(string\)"),
        ({"images": pa.list_(HF)}, r"found images \(list"),
    ],
)
def test_the_column_of_the_images_is_found_by_its_type(tmp_path: Path, columns: dict, expected: str) -> None:
    table = pa.table(
        {
            name: pa.array([{"bytes": name.encode()}], kind)
            if pa.types.is_struct(kind)
            else pa.array([name.encode()], pa.binary()).cast(kind)
            if not pa.types.is_list(kind)
            else pa.array([[]], kind)
            for name, kind in columns.items()
        }
    )
    path = write_parquet(tmp_path / "t.parquet", table)
    if expected in columns:
        assert bytes_of(find_collection(str(path))) == [expected.encode()]
    else:
        with pytest.raises(OptionError, match=f"^t.parquet: expected one column of image bytes.*{expected}"):
            find_collection(str(path))


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a.jpg", "b.jpg", "c.jpg"], ["/a.jpg", "/b.jpg", "/c.jpg"]),
        (["/home/me/a.jpg", "C:\\me\\b.jpg", "x/c.jpg"], ["/a.jpg", "/b.jpg", "/c.jpg"]),
        (["a.jpg", "x/a.jpg", "c.jpg"], ["#0", "#1", "#2"]),
        (["a.jpg", None, "c.jpg"], ["#0", "#1", "#2"]),
        (["a.jpg", "", "c/"], ["#0", "#1", "#2"]),
        (["a.jpg", "..", "c.jpg"], ["#0", "#1", "#2"]),
        (["a.jpg", "b\0.jpg", "c.jpg"], ["#0", "#1", "#2"]),
        ([b"a.jpg", b"\xff.jpg", b"c.jpg"], ["#0", "#1", "#2"]),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "stream", "file", "views"])
def test_rows_are_called_by_their_paths_where_these_tell_them_apart(
    tmp_path: Path, paths: list[str | bytes | None], names: list[str], kind: str
) -> None:
    texts = pa.Array.from_buffers(pa.string(), len(paths), pa.array(paths, pa.binary()).buffers())  # unchecked
    if kind == "views":
        texts = texts.cast(pa.binary()).cast(pa.binary_view()).view(pa.string_view())
    table = pa.table({"image": pa.StructArray.from_arrays([pa.array([b"0", b"1", b"2"]), texts], ["bytes", "path"])})
    path = tmp_path / ("t.parquet" if kind == "parquet" else "t.arrow")
    if kind == "parquet":
        write_parquet(path, table)
    else:
        write_arrow(path, table, stream=kind == "stream")
    found = find_collection(str(path))
    assert found.names == tuple(path.name + name for name in names)
    assert bytes_of(found) == [b"0", b"1", b"2"]


def test_a_row_without_bytes_is_one_image_that_cannot_be_read(tmp_path: Path) -> None:
    table = struct_table({"a.jpg": b"1", "b.jpg": None, "c.jpg": b"3"})  # type: ignore[dict-item]
    found = find_collection(str(write_parquet(tmp_path / "t.parquet", table)))
    assert bytes(found[2].read()) == b"3"  # type: ignore[union-attr]
    with pytest.raises(ImageError, match=r"^t.parquet/b.jpg: its row holds no bytes$") as told:
        found[1].read()  # type: ignore[union-attr]
    assert not isinstance(told.value, ImageUnavailableError)


def test_a_row_group_beyond_the_free_memory_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_collection(str(write_parquet(tmp_path / "t.parquet", struct_table({"a.jpg": b"1" * 9000}))))
    monkeypatch.setattr("lostreg.datasets.tables._KEPT_BYTES", 100)
    monkeypatch.setattr("lostreg.datasets.tables.host_bytes", lambda: 8000)
    with pytest.raises(ImageUnavailableError, match=r"^t.parquet/a.jpg: cannot be read \(its row group takes 0.0 GB"):
        found[0].read()  # type: ignore[union-attr]


def test_a_group_of_rows_is_read_once_for_all_its_threads_and_few_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = {f"{number:02}.jpg": bytes([number]) * 1000 for number in range(40)}
    found = find_collection(str(write_parquet(tmp_path / "t.parquet", struct_table(images), rows=8)))
    monkeypatch.setattr("lostreg.datasets.tables._KEPT_BYTES", 10_000)
    read: list[int] = []
    cells = tables._Parquet.cells

    def slow(self: tables._Parquet, column: str, group: int) -> object:
        read.append(group)
        time.sleep(0.02)
        return cells(self, column, group)

    monkeypatch.setattr(tables._Parquet, "cells", slow)
    with ThreadPoolExecutor(8) as pool:
        contents = list(pool.map(lambda image: bytes(image.read()), found))
    assert contents == list(images.values())
    assert sorted(read) == [0, 1, 2, 3, 4]
    assert len(tables._groups._kept) == 2


def test_groups_of_a_store_that_are_read_in_order_are_read_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    images = {f"{number}.jpg": bytes([number]) * 100 for number in range(6)}
    path = write_parquet(tmp_path / "t.parquet", struct_table(images), rows=1)
    fsspec.filesystem("memory").pipe("/ahead/t.parquet", path.read_bytes())
    read: list[int] = []
    cells = tables._Parquet.cells

    def noted(self: tables._Parquet, column: str, group: int) -> object:
        read.append(group)
        return cells(self, column, group)

    monkeypatch.setattr(tables._Parquet, "cells", noted)
    for asked, expected in (((0, 2, 4), [0, 2, 4]), ((0, 1), [0, 1, 2]), ((0, 1, 2, 3, 4, 5), [0, 1, 2, 3, 4, 5])):
        found = find_collection("memory://ahead/t.parquet")
        read.clear()
        assert [bytes(found[number].read())[0] for number in asked] == list(asked)  # type: ignore[union-attr]
        tables._groups._ahead.submit(int).result()
        deadline = time.monotonic() + 10
        while sorted(read) != expected and time.monotonic() < deadline:
            time.sleep(0.01)
        assert sorted(read) == expected


def test_a_table_that_is_cut_is_refused_in_a_line(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", struct_table({"a.jpg": b"1"}))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(OptionError, match=r"t.parquet: cannot be read \(.*") as told:
        find_collection(str(path))
    assert "\n" not in str(told.value)


def test_what_datasets_saves_counts_without_its_caches_and_with_all_splits(tmp_path: Path) -> None:
    images = {f"{number}.jpg": str(number).encode() for number in range(4)}
    write_saved(tmp_path / "saved" / "train", struct_table(images))
    write_saved(tmp_path / "saved" / "test", struct_table({"x.jpg": b"x", "y.jpg": b"y"}))
    (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    with pytest.warns(LostregWarning, match=r"left out of .*: 5 .json"):
        found = find_collection(str(tmp_path / "saved"))
    assert found.names[:2] == ("test/data-00000-of-00002.arrow/x.jpg", "test/data-00001-of-00002.arrow/y.jpg")
    assert found.names[2:4] == ("train/data-00000-of-00002.arrow/0.jpg", "train/data-00000-of-00002.arrow/1.jpg")
    assert bytes_of(found) == [b"x", b"y", b"0", b"1", b"2", b"3"]
    (tmp_path / "saved/train/data-00001-of-00002.arrow").unlink()
    with pytest.raises(OptionError, match=r"train/data-00001-of-00002.arrow is not there, which train/state.json"):
        find_collection(str(tmp_path / "saved"))


def test_where_there_are_image_files_they_count_alone(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", MEMBERS)
    write_parquet(tmp_path / "t.parquet", struct_table({"a.jpg": b"1"}))
    found = find_collection(str(tmp_path))
    assert len(found) == 5
    assert len(find_collection(f"{tmp_path}/*.tar")) == 4
    (tmp_path / "a.jpg").write_bytes(b"1")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "B.MP4").touch()
    with pytest.warns(
        LostregWarning, match=r"left out of .*: 1 .mp4, 1 .parquet, 1 .tar \(.*such as \"(.*)\"\)"
    ) as told:
        assert find_collection(str(tmp_path)).names == ("a.jpg",)
    pattern = str(told[0].message).split('"')[1]
    assert len(find_collection(pattern)) == 4
    with pytest.warns(LostregWarning, match=re.escape(pattern)):
        find_sources([f"{tmp_path}/*"])


def test_notes_of_macos_are_no_images(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"a/b.jpg": b"1", "a/._b.jpg": b"note", "._c.jpg": b"note"})
    (tmp_path / "._0.tar").write_bytes(b"note")
    with pytest.warns(LostregWarning, match=r"by their endings: 3 \._\* of macOS$"):
        assert find_collection(str(tmp_path)).names == ("0.tar/a/b.jpg",)
    for name in ("a.jpg", "._a.jpg"):
        (tmp_path / name).write_bytes(b"1")
    for find in (find_collection, lambda source: find_sources([source])):
        with pytest.warns(LostregWarning, match=r"2 \._\* of macOS"):
            assert len(find(str(tmp_path))) == 1


def test_a_table_without_images_is_left_out_of_a_folder_with_others(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", MEMBERS)
    write_parquet(tmp_path / "00000.parquet", pa.table({"url": ["u"], "width": [20]}))
    with pytest.warns(LostregWarning, match="by their endings: 1 .parquet without images$"):
        assert len(find_collection(str(tmp_path))) == 4
    write_parquet(tmp_path / "1.parquet", pa.table({"left": [b"1"], "right": [b"1"]}))
    with pytest.raises(OptionError, match=r"^1.parquet: expected one column .* found left"):
        find_collection(str(tmp_path))


def test_images_of_several_sources_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("a", "b"):
        write_tar(tmp_path / folder / "0.tar", {"0.jpg": folder.encode()})
    (tmp_path / "a" / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    expected = ["a/0.tar/0.jpg", "b/0.tar/0.jpg"]
    for arguments in (["a/0.tar", "b/0.tar"], ["a", "b"], ["a/*", "b/*"], ["**"], ["."]):
        assert [str(source) for source in find_sources(arguments)] == expected
    assert [str(source) for source in find_sources([(tmp_path / "a").as_uri()])] == [f"{tmp_path}/a/0.tar/0.jpg"]
    (tmp_path / "a" / "photo.jpg").touch()
    with pytest.warns(LostregWarning, match="1 .tar, 1 .txt"):
        assert find_sources(["a/*"]) == [Path("a/photo.jpg")]  # as `find_collection`


def test_pictures_of_rows_are_called_by_them() -> None:
    images = [stored_at("d/t.parquet#17", "/t.parquet#column=c&group=0&row=17"), Path("d/a.jpg")]
    assert list(unique_names(images)) == ["t.parquet#17", "a"]  # type: ignore[arg-type]


def test_a_sample_is_drawn_from_shards_and_commands_on_files_say_that_they_are_none(tmp_path: Path) -> None:
    shard = str(write_tar(tmp_path / "in" / "0.tar", MEMBERS))
    whole = f"{tmp_path}/in/0.tar/001.jpg"
    assert find_sources([shard])[0] == replace(find_collection(shard)[0], name=whole)  # type: ignore[type-var]
    (single,) = find_sources(["s3://bucket/a.jpg?region=x"])  # it need not be there
    assert (str(single), single.file) == ("s3://bucket/a.jpg", "s3://bucket/a.jpg?region=x")  # type: ignore[union-attr]
    assert find_sources(["file:///nowhere/a.jpg"]) == [Path("/nowhere/a.jpg")]
    assert find_sources([str(tmp_path / "in"), "a.jpg"])[4:] == [Path("a.jpg")]
    with pytest.raises(OptionError, match=r"0.tar/001.jpg is no image file of its own"):
        find_images([shard])


# ------------------------------------------------------------------------------------------------- size


def shard_of(path: Path, count: int) -> Path:
    """A shard of images of one byte, written all at once."""
    header = bytearray(tarfile.TarInfo("000000.jpg").tobuf(tarfile.USTAR_FORMAT))
    members = np.tile(np.frombuffer(bytes(header), np.uint8), (count, 1))
    digits = np.arange(count)[:, None] // 10 ** np.arange(5, -1, -1) % 10
    members[:, :6] = digits + ord("0")
    members[:, 124:135] = np.frombuffer(b"00000000001", np.uint8)
    members[:, 148:156] = ord(" ")
    sums = members.sum(axis=1, dtype=np.int64)
    members[:, 148:154] = sums[:, None] // 8 ** np.arange(5, -1, -1) % 8 + ord("0")
    members[:, 154] = 0
    whole = np.zeros((count, 1024), np.uint8)
    whole[:, :512] = members
    with path.open("wb") as file:
        whole.tofile(file)
        file.write(bytes(1024))
    return path


@pytest.mark.parametrize(("kind", "count"), [("tar", 20_000), ("parquet", 100_000)])
def test_of_many_images_hardly_more_than_their_names_is_kept(tmp_path: Path, kind: str, count: int) -> None:
    if kind == "tar":
        path = shard_of(tmp_path / "0.tar", count)
    else:
        cells = pa.StructArray.from_arrays(
            [pa.array([b"x" * 100] * count), pa.array([f"{number:06}.jpg" for number in range(count)])],
            ["bytes", "path"],
        )
        path = write_parquet(tmp_path / "t.parquet", pa.table({"image": cells}), rows=1000)
    tracemalloc.start()
    try:
        found = find_collection(str(path))
        found.source(found.names[777])
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == count
    assert found.names[-1].endswith(f"/{count - 1:06}.jpg")
    names = sum(map(sys.getsizeof, found.names))
    assert kept < names + 40 * count  # places in the list, offsets, digests


# ------------------------------------------------------------------------------------------------ stores


def test_the_folder_of_a_store_is_listed_with_its_subfolders(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["b.jpg", "a.PNG", "sub dir/ä #1%?.jpg", "notes.txt", "sub dir/deep/c.webp"]
    for name in names:
        server.put(f"photos/trip/{name}", name.encode())
    server.put("photos/tripod.jpg", b"another folder's")
    with pytest.warns(LostregWarning, match="by their endings: 1 .txt"):
        found = find_collection(server.uri("photos/trip"))
    assert found.names == ("a.PNG", "b.jpg", "sub dir/deep/c.webp", "sub dir/ä #1%?.jpg")
    assert bytes_of(found) == [name.encode() for name in found.names]
    assert found.place == server.uri("photos/trip")
    assert find_collection(server.uri("photos/trip/**/*.jpg")).names == ("b.jpg", "sub dir/ä #1%?.jpg")
    assert find_collection(server.uri("photos/trip/*")).names == ("a.PNG", "b.jpg")
    assert find_collection(server.uri("photos/*/sub%20dir/*.jpg")).names == ("trip/sub dir/ä #1%?.jpg",)
    assert len(find_collection(server.uri("photos"))) == 5
    assert find_collection(server.uri("anonymous@photos/trip")).names == found.names
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{server.address}/")
    assert bytes_of(find_collection("s3://photos/trip")) == bytes_of(found)


@pytest.mark.filterwarnings("ignore::lostreg.errors.LostregWarning")
def test_the_place_of_an_image_leads_back_to_it(server: S3Server, tmp_path: Path) -> None:
    server.put("places/ä #1%?.jpg", b"1")
    write_parquet(tmp_path / "a#b" / "t.parquet", pa.table({"a.b&c=": pa.array([b"0", b"1", b"2"])}))
    server.put("places in/t.parquet", (tmp_path / "a#b" / "t.parquet").read_bytes())
    write_tar(tmp_path / "0.tar", MEMBERS)
    for source in (server.uri("places"), str(tmp_path / "a#b"), server.uri("places in"), str(tmp_path / "0.tar")):
        for image in find_collection(source):
            assert isinstance(image, StoredImage)
            assert stored_at(image.name, image.locator) == image
    assert stored_at("a", str(tmp_path / "a#b.jpg")) is None


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nobucket/photos", "nobucket/photos.*: no such folder or file in that store"),
        ("refusals/nothing", "no such folder or file in that store"),
        ("refusals/a.jpg", "is one image"),
        ("refusals/*.gif", "no images in"),
        ("refusals/forbidden", r"cannot be read \(.*ACCESS_DENIED"),
        ("refusals/forbidden.parquet", r"cannot be read \(.*ACCESS_DENIED"),
        ("", "expected s3://BUCKET/NAME"),
    ],
)
def test_what_a_store_cannot_list_is_refused_in_a_line(server: S3Server, path: str, message: str) -> None:
    server.put("refusals/a.jpg", b"1")
    server.forbidden.add("forbidden")
    try:
        with pytest.raises(OptionError, match=message) as told:
            find_collection(server.uri(path))
    finally:
        server.forbidden.clear()
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://key:secret@bucket/photos", "credentials in a URI would be written into results"),
        ("s3://bucket/photos?secret_key=secret", "credentials in a URI would be written into results"),
        ("abfs://host/photos?sig=secret", "credentials in a URI would be written into results"),
        ("s3://somebody@bucket/photos", "nothing or anonymous@ in front of the bucket"),
        ("s3://bucket/photos?reigon=x", "nothing but endpoint_override, region"),
        ("s3://[bucket/photos", "expected SCHEME://BUCKET/NAME"),
        ("nowhere://bucket/photos", "pyarrow knows no such store, and fsspec says"),
        ("file://elsewhere/photos", "of this machine; it names the machine 'elsewhere'"),
    ],
)
def test_a_uri_that_cannot_be_meant_is_refused(uri: str, message: str) -> None:
    with pytest.raises(OptionError, match=message) as told:
        find_collection(uri)
    assert "secret@" not in str(told.value)
    assert "=secret" not in str(told.value)


def test_a_store_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "REQUEST_SECONDS", 0.3)
    monkeypatch.setattr(stores, "CONNECT_SECONDS", 0.3)
    monkeypatch.setattr(stores, "ATTEMPTS", 1)
    for scheme in ("gs", "s3"):
        with pytest.raises(OptionError, match=rf"^{scheme}://anonymous@nobody/photos.*: cannot be read \(.*onnect"):
            find_collection(f"{scheme}://anonymous@nobody/photos?scheme=http&endpoint_override=127.0.0.1:1")


def test_stores_that_pyarrow_does_not_know_are_read_with_fsspec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe({"/lake/photos/a.jpg": b"1", "/lake/photos/sub/b c.jpg": b"22"})
    memory.pipe("/lake/0.tar", write_tar(tmp_path / "0.tar", MEMBERS).read_bytes())
    found = find_collection("memory://lake/photos")
    assert (found.names, bytes_of(found)) == (("a.jpg", "sub/b c.jpg"), [b"1", b"22"])
    sources = find_sources(["memory://lake/photos", "memory://lake/0.tar"])
    assert [str(source) for source in sources[1:3]] == [
        "memory://lake/photos/sub/b c.jpg",
        "memory://lake/0.tar/001.jpg",
    ]
    assert bytes(sources[1].read()) == b"22"  # type: ignore[union-attr]
    assert bytes_of(find_collection("memory://lake/0.tar")) == list(MEMBERS.values())

    def reset(*_: object, **__: object) -> None:
        raise RuntimeError("connection\nreset")

    monkeypatch.setattr(type(memory), "_open", reset)
    with pytest.raises(ImageUnavailableError, match=r"^a.jpg: cannot be read \(connection reset\)$"):
        found[0].read()  # type: ignore[union-attr]


def test_a_list_may_name_images_of_stores(server: S3Server, tmp_path: Path) -> None:
    server.put("listed/a b.jpg", b"1")
    (tmp_path / "local.jpg").write_bytes(b"2")
    (tmp_path / "list.txt").write_text(
        f"{server.uri('listed/a%20b.jpg')}\nlocal.jpg\n{(tmp_path / 'a b.jpg').as_uri()}\n"
    )
    found = find_collection(str(tmp_path / "list.txt"))
    assert found.names == (server.uri("listed/a%20b.jpg"), "local.jpg", f"{tmp_path}/a b.jpg")
    assert bytes_of(found) == [b"1"]
    assert found[1] == tmp_path / "local.jpg"


def test_without_pyarrow_shards_are_read_and_the_rest_says_what_to_install(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", MEMBERS)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    program = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from lostreg.datasets.folder import find_collection\n"
        "print(len(find_collection('0.tar')))\n"
        "for source in ('t.parquet', 's3://bucket/photos'):\n"
        "    try: find_collection(source)\n"
        "    except Exception as error: print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "4", done.stderr
    assert all(re.search(r'needs pyarrow: pip install "lostreg\[lake\]"$', line) for line in lines[1:])
    assert len(lines) == 3
