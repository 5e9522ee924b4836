"""The teacher: a frozen backbone whose patch features are brought together over views, kept picture by picture.

Its features do not change during training, so each picture goes through it once: a file a picture, of its pixels and of
what the views agree on, which a run that goes on finds there.
"""

import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from zipfile import BadZipFile

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lostreg.errors import ImageError, OptionError, TrainingError
from lostreg.images.decode import ImageSource, Picture, name_of, read_image
from lostreg.images.memory import describe_bytes
from lostreg.images.patches import cut_patches
from lostreg.jsonio import whole_file, write_json
from lostreg.models.backbone import Backbone
from lostreg.models.forward import Forward, Grid
from lostreg.models.pixels import normalise_patches
from lostreg.runs.results import results_of
from lostreg.training.views import AGGREGATES, Layout, View, crop, draw_views, lay_back

_LARGEST_HALF: Final = 65504.0
SETTINGS_FILE: Final = "teacher.json"
_READERS: Final = 4  # threads that decode, and images that they are ahead


@dataclass(frozen=True)
class Lesson:
    """What is learned from one picture.

    Attributes:
        patches: RGB of the picture's patches, shape (picture, picture, patch, patch, 3), uint8.
        features: that the views agree on, shape (picture, picture, D), float16; not a number where no view reaches.
    """

    patches: NDArray[np.uint8]
    features: NDArray[np.float16]


def square(pixels: NDArray[np.uint8], side: int, name: str) -> NDArray[np.uint8]:
    """The middle of an image, scaled so that its shorter side fills a square.

    Raises:
        ImageError: if it is smaller than the square.
    """
    height, width = pixels.shape[:2]
    if min(height, width) < side:
        raise ImageError(f"{name}: {width}x{height} pixels are too few for views, which need {side} on each side")
    scale = side / min(height, width)
    size = max(side, round(width * scale)), max(side, round(height * scale))
    scaled = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    top, left = (size[1] - side) // 2, (size[0] - side) // 2
    return np.ascontiguousarray(scaled[top : top + side, left : left + side], dtype=np.uint8)


def pixels_of(patches: Tensor, views: Sequence[View], shape: Grid, backbone: Backbone) -> Tensor:
    """What a model is fed of views of a picture: normalised pixels, (views, rows * columns, patch * patch * 3)."""
    windows = [crop(patches, view, shape) for view in views]
    straight = torch.stack(
        [window.flip(3) if view.mirrored else window for window, view in zip(windows, views, strict=True)]
    )
    patch = backbone.spec.patch_size
    size = (shape[0] * patch, shape[1] * patch)
    return normalise_patches(straight.contiguous(), [size] * len(views), backbone.mean, backbone.std)


class Teacher:
    """A frozen backbone, and how its views are brought together.

    Args:
        backbone: frozen.
        layout: of the windows.
        views: how many, of each picture.
        aggregate: a name of `AGGREGATES`.
        seed: of the views.
    """

    def __init__(self, backbone: Backbone, layout: Layout, views: int, aggregate: str, seed: int) -> None:
        draw_views(layout, views, np.random.default_rng(0))  # complains
        self.layout = layout
        self._backbone = backbone
        self._forward = Forward(backbone)
        self._views = views
        self._aggregate = AGGREGATES[aggregate]
        self._seed = seed

    @property
    def lesson_bytes(self) -> int:
        """What a lesson takes on a disk."""
        width: int = self._backbone.model.embed_dim  # type: ignore[assignment]
        return self.layout.picture**2 * (3 * self.layout.patch**2 + 2 * width)

    def look(self, pixels: Tensor, shape: Grid) -> Tensor:
        """Patch features before the final norm of windows as `pixels_of` gives them: (windows, N, D), float32."""
        walk = self._forward.start([pixels], [shape] * len(pixels))
        while walk.layer < self._backbone.depth:
            self._forward.advance(walk)
        return walk.patches().view(*pixels.shape[:2], -1)

    def teach(self, pixels: NDArray[np.uint8], number: int) -> Lesson:
        """The lesson of a square of pixels; its views depend on the picture's number and the seed alone."""
        views = draw_views(self.layout, self._views, np.random.default_rng([self._seed, number]))
        patches = cut_patches(Picture(pixels, *pixels.shape[1::-1]), self.layout.patch).patches
        on_device = torch.from_numpy(patches).to(self._backbone.device)
        features = self.look(pixels_of(on_device, views, self.layout.shape, self._backbone), self.layout.shape)
        agreed = self._aggregate(lay_back(features, views, self.layout)).clamp(-_LARGEST_HALF, _LARGEST_HALF)
        half = agreed.half().view(self.layout.picture, self.layout.picture, -1)
        return Lesson(patches, half.cpu().numpy())


class Lessons:
    """The lessons of a list of images, in a folder: made once, then read whenever a batch wants them.

    Args:
        folder: that is this list's and this teacher's alone; made if need be.
        teacher: makes what is missing.
    """

    def __init__(self, folder: Path, teacher: Teacher) -> None:
        self._folder = folder
        self._teacher = teacher

    def claim(self, settings: dict[str, Any], images: int) -> None:
        """Make the folder that of these settings, by section, for so many images.

        Raises:
            TrainingError: if it holds what was made with others.
            OptionError: if the disk is too small for all of them.
        """
        path = self._folder / SETTINGS_FILE
        self._folder.mkdir(parents=True, exist_ok=True)
        if not path.exists() and not any(self._folder.glob("*.npz")):
            write_json(path, settings)
        earlier = results_of(self._folder, SETTINGS_FILE)
        if earlier != settings:
            raise TrainingError(
                f"{self._folder} holds the teacher's features of another backbone, of other images, or of other views: "
                "delete it, or keep these elsewhere with --teacher"
            )
        missing = len(self._missing(range(images)))
        needed, free = missing * self._teacher.lesson_bytes, shutil.disk_usage(self._folder).free
        if needed > free:
            raise OptionError(
                f"the teacher's features of {missing} images take {describe_bytes(needed)}, but "
                f"{describe_bytes(free)} are free in {self._folder}: use fewer images or a smaller --max-side"
            )

    def make(self, images: Sequence[ImageSource], numbers: Sequence[int]) -> Iterator[ImageError | None]:
        """Make what is missing, one after the other: None for each image that has a lesson, or why it has none.

        Args:
            images: the whole list.
            numbers: of those that are asked for.
        """
        missing = self._missing(numbers)
        with ThreadPoolExecutor(_READERS) as pool:
            squares = self._squares(pool, [images[number] for number in missing])
            left = set(missing)
            for number in numbers:
                if number not in left:
                    yield None
                    continue
                pixels = next(squares)
                if isinstance(pixels, ImageError):
                    yield pixels
                    continue
                lesson = self._teacher.teach(pixels, number)
                with whole_file(self._path(number)) as beside, beside.open("wb") as file:
                    np.savez(file, patches=lesson.patches, features=lesson.features)
                yield None

    def _squares(
        self, pool: ThreadPoolExecutor, images: Sequence[ImageSource]
    ) -> Iterator[NDArray[np.uint8] | ImageError]:
        waiting: deque[Future[NDArray[np.uint8]]] = deque()
        for place, _ in enumerate(images):
            for image in images[place + len(waiting) : place + _READERS]:
                waiting.append(pool.submit(self._read, image))
            try:
                yield waiting.popleft().result()
            except ImageError as error:
                yield error

    def _read(self, image: ImageSource) -> NDArray[np.uint8]:
        return square(read_image(image).pixels, self._teacher.layout.pixels, name_of(image))

    def __getitem__(self, number: int) -> Lesson:
        """The lesson of an image, by its number in the list.

        Raises:
            TrainingError: if it is gone, or damaged.
        """
        path = self._path(number)
        try:
            with np.load(path) as arrays:
                return Lesson(arrays["patches"], arrays["features"])
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise TrainingError(f"{path} is gone or damaged: delete it and run the same command again") from error

    def _missing(self, numbers: Sequence[int]) -> list[int]:
        return [number for number in numbers if not self._path(number).exists()]

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:07}.npz"
