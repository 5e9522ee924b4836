"""Names of files in exported folders."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lostreg.exports.names import Names, below_one_folder, file_name, utf8_name, xml_text

PARTS = st.lists(st.text(st.sampled_from("aAäß.. /imges\u0301\n\udce4é-2\t"), max_size=8), min_size=1, max_size=4).map(
    "/".join
)


def test_folders_are_kept_and_hidden_or_special_ones_renamed() -> None:
    names = Names(reserved="images")
    given_ = [
        "trip one/ä b.jpg",
        "images/c.png",
        "x/images/c.png",
        "../up.jpg",
        ".d/._e.jpg",
        "a.tar.jpg",
        "/abs/f.jpg",
    ]
    assert [names.stem(name) for name in given_] == [
        "trip one/ä b",
        "images_/c",
        "x/images_/c",
        "_./up",
        "_d/__e",
        "a.tar",
        "abs/f",
    ]


def test_flat_names_have_neither_folders_nor_white_space() -> None:
    names = Names(flat=True)
    assert names.stem("trip one/ä b.jpg") == "trip_one__ä_b"
    assert names.stem("trip_one/ä_b.png") == "trip_one__ä_b-2"


def test_frames_and_rows_keep_their_numbers() -> None:
    names = Names()
    given_ = ["a.b/c.mp4#000015", "a.b/c.mp4#000030", "a.b/c.avi#000030", "t.parquet#7", "c#1.jpg"]
    assert [names.stem(name) for name in given_] == ["a.b/c-000015", "a.b/c-000030", "a.b/c-000030-2", "t-7", "c#1"]
    assert [file_name(name) for name in given_[3:]] == ["t-7.jpg", "c#1.jpg"]


def test_images_of_one_stem_never_share_a_name() -> None:
    names = Names()
    assert [names.stem(name) for name in ("a.jpg", "a.png", "A.webp", "a-2.jpg", "b/a.jpg")] == [
        "a",
        "a-2",
        "A-3",
        "a-2-2",
        "b/a",
    ]


@pytest.mark.parametrize("accent", ["NFC", "NFD"])
def test_accents_written_in_another_way_are_alike(accent: str) -> None:
    names = Names()
    names.stem("Ärger.jpg")
    assert names.stem(unicodedata.normalize(accent, "ärger.png")).endswith("-2")  # type: ignore[arg-type]


def test_long_names_are_cut_and_stay_apart() -> None:
    names = Names(flat=True)
    stems = [names.stem("ä" * 200 + f"/{number}.jpg") for number in range(3)]
    assert len(set(stems)) == 3
    assert all(len(stem.encode()) <= 200 for stem in stems)


@given(names=st.lists(PARTS, max_size=12), flat=st.booleans())
def test_whatever_comes_in_names_are_apart_safe_and_text(names: list[str], flat: bool) -> None:
    made = Names(flat=flat, reserved="images")
    stems = [made.stem(name) for name in names]
    alike = [unicodedata.normalize("NFC", stem).casefold() for stem in stems]
    assert len(set(alike)) == len(stems)
    for stem in stems:
        parts = stem.split("/")
        assert all(part and not part.startswith(".") for part in parts)
        assert "images" not in parts[:-1]
        assert stem.encode("utf-8").decode().isprintable() or "\u0301" in stem
        assert not flat or (len(parts) == 1 and not any(sign.isspace() for sign in stem))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.jpg", "b/c.jpg", "./d//e.jpg"], ["a.jpg", "b/c.jpg", "d/e.jpg"]),
        (["/h/x/a.jpg", "/h/y/b.jpg"], ["x/a.jpg", "y/b.jpg"]),
        (["../p/x/a.jpg", "../p/b.jpg", "c.jpg"], ["x/a.jpg", "b.jpg", "c.jpg"]),
        (["../a/x.jpg", "../../b/y.jpg"], ["_/a/x.jpg", "b/y.jpg"]),
        (["a/../../b.jpg", "/../c.jpg"], ["b.jpg", "c.jpg"]),
        (["", "/", ".."], ["_", "_", "_"]),
    ],
)
def test_names_are_below_one_folder(names: list[str], expected: list[str]) -> None:
    assert below_one_folder(names) == expected


@given(names=st.lists(st.lists(st.sampled_from(["", ".", "..", "a", "b"]), max_size=5).map("/".join), max_size=5))
def test_no_name_leads_up_or_to_the_root(names: list[str]) -> None:
    for name in below_one_folder(names):
        assert not {"", ".", ".."} & set(name.split("/"))


def test_signs_of_later_unicode_stay() -> None:
    assert xml_text("\U0001fae9\U000e0fff.jpg") == "\U0001fae9\U000e0fff.jpg"


@given(name=st.text(st.characters(exclude_categories=())))
def test_other_tools_can_write_every_name(name: str) -> None:
    made = utf8_name(name)
    assert "\0" not in made.encode("utf-8").decode()
    assert utf8_name(made) == made
