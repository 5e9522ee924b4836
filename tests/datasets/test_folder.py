"""Which files a folder, a glob and a list stand for, and what they are called."""

import codecs
import os
import sys
from pathlib import Path

import pytest

from lostreg.datasets.folder import Collection, find_collection, find_images
from lostreg.errors import LostregWarning, OptionError
from lostreg.images.files import SUFFIXES


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("b.jpg", "a.PNG", "trip one/ä b.jpg", "trip two/b.jpg", "notes.txt", "trip one/deep/c.webp"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return tmp_path / "photos"


def test_a_folder_stands_for_its_images_with_their_subfolders(photos: Path) -> None:
    found = find_collection(str(photos))
    assert found.names == ("a.PNG", "b.jpg", "trip one/deep/c.webp", "trip one/ä b.jpg", "trip two/b.jpg")
    assert found.root == photos
    assert found.path(found.names[2]) == photos / "trip one" / "deep" / "c.webp"


def test_names_do_not_depend_on_where_the_folder_is_seen_from(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = find_collection(str(photos))
    monkeypatch.chdir(photos)
    found = find_collection(".")
    assert found.names == expected.names
    assert found.fingerprint() == expected.fingerprint()


def test_links_in_a_circle_end(photos: Path) -> None:
    (photos / "trip two" / "up").symlink_to(photos)
    assert len(find_collection(str(photos))) == 5


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("**/*.jpg", ("b.jpg", "trip one/ä b.jpg", "trip two/b.jpg")),
        ("trip*/b.jpg", ("trip two/b.jpg",)),
        ("trip one/*", ("ä b.jpg",)),
    ],
)
def test_a_glob_is_told_from_the_folder_before_its_wildcards(
    photos: Path, pattern: str, names: tuple[str, ...]
) -> None:
    found = find_collection(f"{photos}/{pattern}")
    assert found.names == names
    assert all(found.path(name).is_file() for name in found.names)


def test_a_list_is_relative_to_its_own_folder(photos: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere.png"
    listed = photos / "list.txt"
    listed.write_text(f"\ufeff# the best\ntrip two/b.jpg\r\n\n./b.jpg\nb.jpg\n{other}\n", encoding="utf-8")
    found = find_collection(str(listed))
    assert found.names == ("trip two/b.jpg", "b.jpg", other.as_posix())
    assert [found.path(name) for name in found.names] == [photos / "trip two/b.jpg", photos / "b.jpg", other]


@pytest.mark.skipif(os.name != "posix", reason="names that are no text exist on POSIX only")
def test_names_need_not_be_text(photos: Path) -> None:
    (photos / os.fsdecode(b"\xff.jpg")).write_bytes(b"")
    found = find_collection(str(photos))
    assert all(found.path(name).exists() for name in found.names)
    assert len(found.fingerprint()) == 64
    (photos / "list.txt").write_bytes(b"\xff.jpg\n")
    assert find_collection(str(photos / "list.txt")).names == (os.fsdecode(b"\xff.jpg"),)


def test_another_order_is_another_collection() -> None:
    assert Collection(Path(), ("a", "b")).fingerprint() != Collection(Path(), ("b", "a")).fingerprint()
    assert Collection(Path(), ("a", "b")).fingerprint() == Collection(Path("x"), ("a", "b")).fingerprint()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "'nowhere': no such folder or list"),
        ("photos/*.gif", "no image matches"),
        ("photos/*.txt", "no image matches"),
        ("photos/b.jpg", "is one image: expected a folder, a glob or a list"),
        ("empty", "no images in empty: expected files ending in .jpg"),
        ("empty.txt", "lists no images"),
        ("binary.txt", "is no list of images"),
        ("", "no such folder or list"),
    ],
)
def test_what_holds_no_images_is_refused(
    photos: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    monkeypatch.chdir(photos.parent)
    Path("empty").mkdir()
    Path("empty.txt").write_text("# nothing\n\n")
    Path("binary.txt").write_bytes(b"\x00\x01")
    with pytest.raises(OptionError, match=message.replace("*", r"\*")):
        find_collection(source)


def test_what_a_run_writes_is_none_of_its_photos(photos: Path) -> None:
    expected = find_collection(str(photos)).names
    (photos / "out/masks").mkdir(parents=True)
    (photos / "out/masks/b.jpg.png").write_bytes(b"")
    (photos / "out/predictions.jsonl").write_bytes(b"")
    for source in (str(photos), f"{photos}/**/*"):
        assert find_collection(source, apart=photos / "out/masks").names == expected
        assert len(find_collection(source).names) == len(expected) + 1


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return touch(tmp_path / "voc" / "JPEGImages", *(f"im{number:02}.jpg" for number in range(5)))


def find(*arguments: object) -> list[Path]:
    return find_images(map(str, arguments))


def test_folders_are_searched_to_the_bottom_and_sorted(tmp_path: Path) -> None:
    top = touch(tmp_path / "top", "z.JPG", "deep/a.jpeg", "deep/notes.txt", "b.png")
    (top / "folder.jpg").mkdir()  # named like an image
    assert find(top) == [top / "b.png", top / "deep/a.jpeg", top / "z.JPG"]


def test_globs_are_expanded_and_sorted(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [path.name for path in find(images / "im0[2-4].jpg", images / "im00.jpg")]
    assert names == ["im02.jpg", "im03.jpg", "im04.jpg", "im00.jpg"]
    monkeypatch.chdir(images.parent)
    assert find("**/*1.jpg") == [Path("JPEGImages/im01.jpg")]


def test_a_glob_finds_files_alone_whatever_their_suffix(images: Path) -> None:
    (images / "im99.jpg").mkdir()
    touch(images, "im50.tmp")
    assert [path.name for path in find(images / "im[59]*")] == ["im50.tmp"]


def test_a_file_whose_name_looks_like_a_glob_is_itself(tmp_path: Path) -> None:
    odd = touch(tmp_path, "a[1].jpg", "a1.jpg") / "a[1].jpg"
    assert find(odd) == [odd]


def test_linked_folders_are_searched_and_circles_end(images: Path, tmp_path: Path) -> None:
    place = tmp_path / "linked"
    place.mkdir()
    (place / "more").symlink_to(images, target_is_directory=True)
    (place / "circle").symlink_to(place, target_is_directory=True)
    assert find(place) == [place / "more" / f"im{number:02}.jpg" for number in range(5)]


def test_files_are_taken_as_they_are_named_in_the_order_given_even_if_they_are_not_there(images: Path) -> None:
    wanted = [images / "im03.jpg", images / "none.jpg", images / "notes", images / "im00.jpg", images / "im03.jpg"]
    assert find(*wanted) == wanted


def test_every_suffix_that_can_be_read_is_an_image_of_a_folder(tmp_path: Path) -> None:
    names = [f"{number}{suffix}" for number, suffix in enumerate(SUFFIXES)]
    folder = touch(tmp_path / "all", *names, *(name.upper() for name in names), "a.txt", "jpg")
    assert {path.name for path in find(folder)} == {*names, *(name.upper() for name in names)}


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names are Unicode there")
def test_a_file_name_that_is_no_utf8_is_found(tmp_path: Path) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")
    touch(tmp_path, odd)
    assert find(tmp_path) == find(tmp_path / "caf*") == [Path(odd)]


def test_arguments_that_stand_for_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(OptionError, match="expected a file, folder or glob, found an empty argument"):
        find("")
    with pytest.raises(OptionError, match=r"no images in .*empty: expected files ending in \.jpg"):
        find(tmp_path / "empty")
    with pytest.raises(OptionError, match=r"no file matches '.*\*\.gif'"):
        find(tmp_path / "*.gif")
    assert find() == []


@pytest.mark.parametrize("mark", [b"PK\x03\x04", b"\x1f\x8b\x08\x00"])
def test_an_archive_is_no_list(tmp_path: Path, mark: bytes) -> None:
    (tmp_path / "photos.zip").write_bytes(mark + bytes(100))
    with pytest.raises(OptionError, match=r"photos.zip is packed with g?zip: unpack it first; .* \.tar alone"):
        find_collection(str(tmp_path / "photos.zip"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-8-sig"])
def test_lists_of_windows_are_read(tmp_path: Path, encoding: str) -> None:
    text = "a.jpg\r\nété/日本.jpg\r\n"
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    (tmp_path / "list.txt").write_bytes(mark + text.encode(encoding))
    assert find_collection(str(tmp_path / "list.txt")).names == ("a.jpg", "été/日本.jpg")


def test_what_only_begins_like_utf16_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(codecs.BOM_UTF16_LE + b"odd")
    with pytest.raises(OptionError, match=r"list\.txt is no list of images: it begins as UTF-16"):
        find_collection(str(tmp_path / "list.txt"))


def test_what_is_left_out_is_counted_by_its_ending(photos: Path) -> None:
    for name in ("a.mp4", "trip one/b.mp4", "notes", ".hidden", "c.heic", "d.heic", "e.heic"):
        (photos / name).touch()
    is_read = ".heic" in SUFFIXES
    heic = () if is_read else ("3 .heic",)
    heif = "" if is_read else r'HEIC is read with pillow-heif: pip install "lostreg\[heif\]"; '
    hint = rf' \({heif}there are photos, and videos, shards and tables are taken alone, such as ".*/\*\.mp4"\)$'
    counts = ", ".join((*heic, "2 without ending", "2 .mp4", "1 .txt"))
    for find in (lambda: find_collection(str(photos)), lambda: find_images([str(photos)])):
        with pytest.warns(LostregWarning, match=f"left out of .*photos, by their endings: {counts}{hint}"):
            find()
    with pytest.warns(LostregWarning, match="by their endings: .*1 .txt"):
        find_collection(f"{photos}/**/*")


@pytest.mark.parametrize("ending", [".jfif", ".jpe", ".gif", ".avif", ".JP2", ".PPM"])
def test_any_image_that_can_be_read_is_taken(photos: Path, ending: str) -> None:
    (photos / f"z{ending}").touch()
    assert f"z{ending}" in find_collection(str(photos)).names
    assert photos / f"z{ending}" in find_images([str(photos)])
