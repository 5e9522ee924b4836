"""Fixtures that several test modules share."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the hub's client is imported: no test waits for a hub

import numpy as np
import pytest
import torch
from PIL import Image

from lostreg.defaults import BACKBONE_VARIABLE, DEVICE_VARIABLE
from lostreg.errors import ImageUnavailableError
from lostreg.images import decode
from lostreg.inference import stream
from lostreg.inference.discovery import Discovery
from lostreg.models.backbone import Backbone, build_backbone, find_spec, load_backbone

if TYPE_CHECKING:
    from fabricate_lake import S3Server

SHAPES = [(150, 110), (90, 120), (98, 70), (150, 112), (60, 60)]  # width, height: two share a grid of 8 x 11


@pytest.fixture(scope="session")
def repository(pytestconfig: pytest.Config) -> Path:
    """The checkout that these tests lie in."""
    return pytestconfig.rootpath


@pytest.fixture(scope="session")
def shared_data(repository: Path) -> Path:
    """Pictures and features that may not be redistributed: CONTRIBUTING.md says what they are."""
    folder = Path(os.environ.get("LOSTREG_TEST_DATA", repository.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("needs pictures that are not distributed with lostreg: see LOSTREG_TEST_DATA in CONTRIBUTING.md")
    return folder


@pytest.fixture(scope="session")
def imgfocus() -> Backbone:
    """The trained offline backbone."""
    return load_backbone("imgfocus_vits14")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """Two random blocks with registers, for tests of what surrounds a model."""
    torch.manual_seed(0)
    return build_backbone(find_spec("dinov2_vits14_reg"), depth=2)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small models on small pictures: threads would spend their time waiting for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def server() -> "Iterator[S3Server]":
    """A store that speaks like Amazon's, on this machine, and credentials for it."""
    from fabricate_lake import S3Server

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        with S3Server().running() as running:
            yield running


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture with a bright disc on a dark gradient, 150x110 pixels: no multiple of any patch size."""
    path = tmp_path / "photo.jpg"
    Image.fromarray(disc_picture()).save(path, quality=95)
    return path


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of files that cannot be had."""
    names: set[str] = set()

    def read(source: decode.ImageSource, **options: object) -> object:
        path = Path(decode.name_of(source))
        if path.name in names:
            raise ImageUnavailableError(f"{path}: Stale file handle")
        return decode.read_image(source, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(stream, "read_image", read)
    return names


def disc_picture(width: int = 150, height: int = 110) -> np.ndarray:
    """RGB (height, width, 3), uint8: a bright disc left of the middle."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 60 // width, y * 60 // height, (x + y) % 40], axis=2).astype(np.uint8)
    pixels[(x - width * 0.4) ** 2 + (y - height * 0.5) ** 2 < (height * 0.3) ** 2] = (230, 180, 40)
    return pixels


def scene(number: int, width: int = 150, height: int = 110) -> np.ndarray:
    """A picture whose disc lies elsewhere for each number: with the random backbone their boxes differ."""
    return np.roll(disc_picture(width, height), (number * 53, number * 37), axis=(0, 1))


def scenes(count: int) -> list[np.ndarray]:
    """Pictures of mixed shapes."""
    return [scene(number, *SHAPES[number * 7 % len(SHAPES)]) for number in range(count)]


def same(first: Discovery, second: Discovery) -> bool:
    """Whether two discoveries are equal to the bit."""
    return all(
        np.array_equal(getattr(first, field.name), getattr(second, field.name))
        for field in dataclasses.fields(Discovery)
        if field.name != "source"
    )


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of lostreg, whatever the environment asks for."""
    for variable in (BACKBONE_VARIABLE, DEVICE_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
