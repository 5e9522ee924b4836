"""What a collection of unlabelled images teaches about its objects: see `lostreg.methods.learned`."""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lostreg import defaults
from lostreg.checks import whole_seed
from lostreg.errors import ImageError, ObjectnessError, OptionError
from lostreg.images.decode import ImageSource
from lostreg.images.patches import PatchedPicture
from lostreg.inference.discoverer import Discoverer, check_discoverer
from lostreg.inference.jobs import FeaturesJob, Grid, ObjectsJob
from lostreg.inference.methods import TOKENS, PartsMaps, parts
from lostreg.inference.objectness import Facts, Objectness, fingerprint
from lostreg.inference.stream import draw_sample
from lostreg.methods.learned import fit
from lostreg.methods.parts import candidate_masks
from lostreg.progress import OnProgress, telling

Lesson = tuple[Tensor, NDArray[np.bool_], NDArray[np.float32]]  # an image's tokens, candidates and their scores


def learn(
    images: Iterable[ImageSource],
    discoverer: Discoverer,
    *,
    sample: int = defaults.OBJECTNESS_IMAGES,
    seed: int = 0,
    on_progress: OnProgress = lambda _: None,
) -> Objectness:
    """Learn from unlabelled images, in one pass over them, which patches are part of objects.

    Args:
        images: files, PIL images or arrays, as `Discoverer.discover` takes them.
        discoverer: backbone, feature and layer of the candidates that teach, and how images are read; its method is
            ``parts`` whatever it says.
        sample: how many images to look at, at least 1; of more, a random sample.
        seed: of that sample.
        on_progress: called after each image.

    Raises:
        OptionError: if there are no images, or ``sample`` is below 1.
        ObjectnessError: if no image can be read, or none has a candidate that teaches.

    Example:
        >>> discoverer = lostreg.Discoverer("dinov2_vits14_reg", device="cpu")
        >>> lostreg.learn(sorted(Path("photos").iterdir()), discoverer).facts.images
        3
    """
    check_discoverer(discoverer, "images and then a Discoverer")
    sources, seed = draw_sample(images, sample, seed), whole_seed(seed)
    options = discoverer.options
    features = FeaturesJob(discoverer.backbone, [(options.feature, options.layer), TOKENS], compiled=options.compile)
    bias = "auto" if options.method == "lost" else options.bias
    method = parts(bias, options.k_patches, scorer=options.scorer)
    job = ObjectsJob(features, method, normalize=True, beside=1, convert=_lessons)
    errors: list[ImageError] = []
    names: set[str] = set()

    def lessons() -> Iterator[Lesson]:
        outcomes = telling(discoverer.stream_of(job).outcomes(sources), len(sources), on_progress)
        for source, outcome in zip(sources, outcomes, strict=True):
            if isinstance(outcome, ImageError):
                errors.append(outcome)
            else:
                name = fingerprint(source)
                if name is not None:
                    names.add(name)
                yield outcome

    try:
        head = fit(lessons())
    except OptionError as error:
        if len(errors) < len(sources):
            raise ObjectnessError(f"nothing was learned: {error}") from error
        raise ObjectnessError(f"none of {len(sources)} images could be read, so nothing was learned") from error
    return Objectness(
        head,
        Facts(
            backbone=discoverer.backbone.spec.name,
            weights=discoverer.backbone.weights,
            images=len(sources) - len(errors),
            unreadable=len(errors),
            seed=seed,
            names=tuple(sorted(names)),
        ),
    )


def _lessons(found: list[tuple[PartsMaps, Tensor, Grid]], pictures: list[PatchedPicture]) -> list[Lesson]:
    del pictures
    ((maps, features, grid),) = found
    candidates = candidate_masks(maps.lost.candidates(features, grid), maps.labels.numpy())
    (tokens,) = maps.tokens
    return [(of_image, one.masks, one.scores) for of_image, one in zip(tokens, candidates, strict=True)]
