"""What a collection of unlabelled images teaches about its objects: see `lostreg.methods.learned`."""

from collections.abc import Iterator, Sequence

from lostreg import defaults
from lostreg.checks import whole_seed
from lostreg.errors import ImageError, ObjectnessError
from lostreg.images.decode import ImageSource
from lostreg.images.patches import PatchedPicture
from lostreg.inference.discoverer import Discoverer
from lostreg.inference.jobs import FeaturesJob, ObjectsJob
from lostreg.inference.methods import TOKENS
from lostreg.inference.objectness import Facts, Objectness
from lostreg.inference.stream import draw_sample
from lostreg.methods.learned import Lesson, fit
from lostreg.methods.parts import Parts
from lostreg.progress import OnProgress, Progress


def learn(
    images: Sequence[ImageSource],
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
    sources, seed = draw_sample(images, sample, seed), whole_seed(seed)
    options = discoverer.options
    features = FeaturesJob(
        discoverer.backbone, [(options.feature, options.layer), TOKENS], compiled=options.compile
    )
    bias = "auto" if options.method == "lost" else options.bias
    job = ObjectsJob(features, Parts(bias, options.k_patches, learns=True), normalize=True, convert=_lessons)
    errors: list[ImageError] = []

    def lessons() -> Iterator[Lesson]:
        for done, outcome in enumerate(discoverer.stream_of(job).outcomes(sources), start=1):
            error = outcome if isinstance(outcome, ImageError) else None
            if isinstance(outcome, ImageError):
                errors.append(outcome)
            else:
                yield outcome
            on_progress(Progress(done, len(sources), error=error))

    head = fit(lessons())
    if head is None:
        raise ObjectnessError(
            f"nothing was learned: of {len(sources)} images {len(errors)} could not be read, and no other has parts"
        )
    return Objectness(
        head,
        Facts(
            backbone=discoverer.backbone.spec.name,
            weights=discoverer.backbone.weights,
            images=len(sources) - len(errors),
            unreadable=len(errors),
            seed=seed,
        ),
    )


def _lessons(found: list[list[Lesson]], pictures: list[PatchedPicture]) -> list[Lesson]:
    del pictures
    return found[0]
