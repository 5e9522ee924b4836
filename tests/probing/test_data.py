"""Folders of labelled images: what is read, how it is split, and what is refused."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lostreg.errors import ImageError, LostregError, OptionError
from lostreg.probing.data import load_probe_data, read_depth, read_mask


def picture(path: Path, width: int = 12, height: int = 8, exif: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    info = Image.Exif()
    if exif is not None:
        info[0x0112] = exif
    Image.new("RGB", (width, height), "grey").save(path, exif=info)
    return path


def mask(path: Path, values: object, *, palette: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, np.uint8))
    if palette:
        image = image.convert("P")
        image.putpalette(list(range(256)) * 3)
        image.putdata(np.asarray(values, np.uint8).ravel().tolist())
    image.save(path)
    return path


def halves(left: int, right: int) -> np.ndarray:
    return np.array([[left] * 6 + [right] * 6] * 8)


def write_classes(root: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture(root / name / f"{number}.png")
    return root


def write_masks(root: Path, count: int = 4, part: str = "") -> Path:
    for number in range(count):
        picture(root / "images" / part / f"{number}.png")
        mask(root / "masks" / part / f"{number}.png", halves(0, 2 + number % 2 * 253))
    return root


def test_classes_are_folders(tmp_path: Path) -> None:
    data = load_probe_data(write_classes(tmp_path, {"cat": 4, "ant": 5}), "classification")
    assert data.classes == ("ant", "cat")
    assert data.labels.tolist() == [0] * 5 + [1] * 4
    assert data.held_out is None
    assert [image.path.parent.name for image in data.images] == ["ant"] * 5 + ["cat"] * 4


@pytest.mark.parametrize(("training", "measuring"), [("train", "val"), ("training", "test"), ("train", "validation")])
def test_classes_may_come_in_two_parts(tmp_path: Path, training: str, measuring: str) -> None:
    write_classes(tmp_path / training, {"cat": 2, "ant": 3})
    write_classes(tmp_path / measuring, {"cat": 1, "ant": 1})
    data = load_probe_data(tmp_path, "classification")
    assert data.held_out is not None
    assert data.held_out.tolist() == [False] * 5 + [True] * 2
    fitted, chosen_on, measured = data.split(0, np.arange(7))
    assert measured.tolist() == [5, 6]
    assert sorted([*fitted, *chosen_on]) == [0, 1, 2, 3, 4]
    assert sorted(data.labels[chosen_on]) == [0, 1]


def test_splits_hold_each_class_and_depend_on_the_seed_alone(tmp_path: Path) -> None:
    data = load_probe_data(write_classes(tmp_path, {"cat": 4, "ant": 20}), "classification")
    usable = np.delete(np.arange(24), 3)
    parts = data.split(1, usable)
    assert sorted(np.concatenate(parts)) == usable.tolist()
    assert [np.bincount(data.labels[part]).tolist() for part in parts] == [[10, 2], [3, 1], [6, 1]]
    assert all(np.array_equal(*pair) for pair in zip(parts, data.split(1, usable), strict=True))
    assert not np.array_equal(parts[2], data.split(2, usable)[2])


def test_masks_lie_beside_images(tmp_path: Path) -> None:
    data = load_probe_data(write_masks(tmp_path), "segmentation")
    assert data.classes == ("0", "2")  # 255 is none
    np.testing.assert_array_equal(data.read_map(0), halves(0, 1))
    np.testing.assert_array_equal(data.read_map(1), halves(0, -1))
    assert load_probe_data(tmp_path, "segmentation", ignore=()).classes == ("0", "2", "255")
    assert load_probe_data(tmp_path, "segmentation", ignore=[0, 7]).classes == ("2", "255")


def test_the_layout_of_ade20k_is_read_as_it_is(tmp_path: Path) -> None:
    write_masks(tmp_path, 3, "training")
    write_masks(tmp_path, 2, "validation")
    (tmp_path / "masks").rename(tmp_path / "annotations")
    data = load_probe_data(tmp_path, "segmentation", ignore=[255])
    assert data.held_out is not None
    assert data.held_out.tolist() == [False] * 3 + [True] * 2
    assert data.maps[4] == tmp_path / "annotations/validation/1.png"


@pytest.mark.parametrize("place", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_the_layout_of_voc_is_read_as_it_is(tmp_path: Path, place: str) -> None:
    root = tmp_path / place
    for stem in ("a", "b", "c", "unlabelled"):
        picture(root / "JPEGImages" / f"{stem}.jpg")
    for stem in ("a", "b", "c"):
        mask(root / "SegmentationClass" / f"{stem}.png", halves(15, 255), palette=True)
    mask(root / "SegmentationClass/c.png", halves(15, 0), palette=True)
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/train.txt").write_text("c\na\n")
    (root / "ImageSets/Segmentation/val.txt").write_text("b\n")
    data = load_probe_data(tmp_path, "segmentation")
    assert [image.path.stem for image in data.images] == ["c", "a", "b"]
    assert data.classes == ("0", "15")
    assert data.held_out is not None
    assert data.held_out.tolist() == [False, False, True]
    np.testing.assert_array_equal(data.read_map(2), halves(1, -1))


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("png", lambda path, depth: Image.fromarray(depth.astype(np.uint16)).save(path)),
        ("tiff", lambda path, depth: Image.fromarray(depth.astype(np.float32)).save(path)),
        ("npy", lambda path, depth: np.save(path, depth)),
        ("npz", lambda path, depth: np.savez_compressed(path, depth=depth[..., None], other=np.zeros(3))),
        ("npz", lambda path, depth: np.savez(path, anything=depth.astype(np.int32))),
    ],
)
def test_depths_come_in_several_files(tmp_path: Path, name: str, save: Callable[[Path, np.ndarray], None]) -> None:
    depth = np.arange(96.0).reshape(8, 12) * 600
    save(tmp_path / f"a.{name}", depth)
    found = read_depth(tmp_path / f"a.{name}")
    assert found.dtype == np.float32
    assert np.isnan(found[0, 0])
    np.testing.assert_array_equal(found.ravel()[1:], depth.ravel()[1:])


def test_what_is_no_depth_is_missing(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[1, 0, -1, np.nan, np.inf, 1e300]]))
    assert read_depth(tmp_path / "a.npy")[0].tolist()[0] == 1
    assert np.isnan(read_depth(tmp_path / "a.npy")[0, 1:]).all()


def test_an_image_is_turned_where_its_mask_is(tmp_path: Path) -> None:
    write_masks(tmp_path)
    picture(tmp_path / "images/0.png", 8, 12, exif=6)
    picture(tmp_path / "images/1.png", 12, 8, exif=6)
    data = load_probe_data(tmp_path, "segmentation")
    assert [image.exif for image in data.images] == [True, False, False, False]


def test_a_broken_image_is_no_reason_to_stop_but_a_broken_mask_is(tmp_path: Path) -> None:
    write_masks(tmp_path, 5)
    (tmp_path / "images/2.png").write_text("no picture")
    assert len(load_probe_data(tmp_path, "segmentation").images) == 5
    (tmp_path / "masks/3.png").write_bytes((tmp_path / "masks/3.png").read_bytes()[:40])
    with pytest.raises(ImageError, match=r"masks/3\.png: not a readable image"):
        load_probe_data(tmp_path, "segmentation")


def test_fingerprints_tell_data_apart(tmp_path: Path) -> None:
    write_masks(tmp_path, 5)
    before = load_probe_data(tmp_path, "segmentation").fingerprint()
    assert load_probe_data(tmp_path, "segmentation").fingerprint() == before
    mask = tmp_path / "masks/4.png"
    mask.write_bytes(mask.read_bytes() + b"\0")  # another file of the same name
    changed = load_probe_data(tmp_path, "segmentation").fingerprint()
    assert changed != before
    for folder in ("images", "masks"):
        (tmp_path / folder / "4.png").unlink()
    assert load_probe_data(tmp_path, "segmentation").fingerprint() not in (before, changed)


def _with(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        write_masks(root)
        make(root)

    return change


REFUSED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no folder": ("classification", Path.rmdir, "no such folder"),
    "no class": ("classification", lambda _: None, "a sub-folder for each of at least 2 classes, found none"),
    "one class": ("classification", lambda root: write_classes(root, {"cat": 5}), "at least 2 classes, found cat"),
    "a class without images": (
        "classification",
        lambda root: write_classes(root, {"ant": 4, "cat": 0}),
        "class 'cat': no images in .*cat",
    ),
    "few of a class": (
        "classification",
        lambda root: write_classes(root, {"ant": 4, "cat": 3}),
        r"4 images a class, not cat \(3\)",
    ),
    "few of a class to train on": (
        "classification",
        lambda root: [write_classes(root / part, {"ant": 4, "cat": 1}) for part in ("train", "val")],
        r"at least 2 images a class of the training part, not cat \(1\)",
    ),
    "a class to measure alone": (
        "classification",
        lambda root: [write_classes(root / "train", {"a": 4, "b": 4}), write_classes(root / "val", {"a": 1, "c": 1})],
        "train has no images of classes that are in .*val: c",
    ),
    "no part to measure on": (
        "classification",
        lambda root: write_classes(root / "train", {"a": 4, "b": 4}),
        "has train, but none of val, validation, test",
    ),
    "no images": ("segmentation", lambda root: mask(root / "masks/a.png", halves(0, 1)), "folders images and masks"),
    "no depths": ("depth", _with(lambda root: None), "folders images and depth"),
    "no pairs": (
        "segmentation",
        lambda root: [picture(root / "images/b.png"), mask(root / "masks/a.png", halves(0, 1))],
        r"no pairs: no image in .* has a mask of its name in .*masks \(\.png\)",
    ),
    "no mask": ("segmentation", _with(lambda root: picture(root / "images/x.png")), "1 images in .* have no mask.*: x"),
    "no image": (
        "segmentation",
        _with(lambda root: mask(root / "masks/x.png", halves(0, 1))),
        "1 masks in .* no image.*: x",
    ),
    "two of a name": (
        "segmentation",
        _with(lambda root: picture(root / "images/1.jpg")),
        "several files of one name: 1",
    ),
    "another size": (
        "segmentation",
        _with(lambda root: picture(root / "images/1.png", 12, 9)),
        r"1\.png: expected a mask of its image's 12x9 pixels, not 12x8",
    ),
    "colours": (
        "segmentation",
        _with(lambda root: picture(root / "masks/1.png")),
        "expected an index mask.*, found RGB",
    ),
    "one value": (
        "segmentation",
        _with(lambda root: [mask(root / f"masks/{number}.png", halves(7, 255)) for number in range(4)]),
        r"at least 2 classes, found 7 \(ignored: 255\)",
    ),
    "few images": ("segmentation", lambda root: write_masks(root, 3), "at least 4 images, found 3"),
    "a missing mask of VOC": (
        "segmentation",
        lambda root: (
            [(root / name).mkdir(parents=True) for name in ("SegmentationClass", "ImageSets/Segmentation")]
            + [(root / "ImageSets/Segmentation/train.txt").write_text("a")]
        ),
        "lists 2 files that are missing: .*JPEGImages/a.jpg",
    ),
    "no depth": (
        "depth",
        lambda root: [
            picture(write_masks(root) / "images/0.png"),
            (root / "masks").rename(root / "depth"),
            *[mask(root / f"depth/{number}.png", halves(0, 0)) for number in range(4)],
        ],
        "no pixel of the 4 depth maps has a depth",
    ),
}


@pytest.mark.parametrize(("task", "make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_laid_out_otherwise_is_refused_in_words(
    tmp_path: Path, task: str, make: Callable[[Path], object], message: str
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    make(root)
    with pytest.raises(LostregError) as caught:
        load_probe_data(root, task)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_task_must_be_one_of_four(tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match="task must be one of classification, segmentation, depth, zero-shot, not 'detection'"
    ):
        load_probe_data(tmp_path, "detection")
    with pytest.raises(OptionError, match="ignore must be an integer"):
        load_probe_data(write_masks(tmp_path), "segmentation", ignore=[-1])


@pytest.mark.parametrize("shape", [(3,), (2, 2, 3), (0, 4)])
def test_depths_are_planes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "a.npy", np.ones(shape))
    with pytest.raises(LostregError, match=r"expected depths of shape \(height, width\), found float64"):
        read_depth(tmp_path / "a.npy")


def test_objects_are_not_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[None]]), allow_pickle=True)
    with pytest.raises(ImageError, match="not a readable image"):
        read_depth(tmp_path / "a.npy")


def test_masks_have_values_of_any_depth(tmp_path: Path) -> None:
    deep = np.array([[0, 300], [65535, 7]])
    Image.fromarray(deep.astype(np.uint16)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), deep)
    Image.fromarray(deep > 7).save(tmp_path / "b.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "b.png"), deep > 7)
