"""Linear probes: what can be read off a token about its place, its patch and its image.

"Vision Transformers Need Registers" (Darcet et al., ICLR 2024, section 2.2) trains linear models on high-norm tokens
and on normal ones, and compares how much of each kind of information they hold. The models are scikit-learn's:

* position: linear discriminant analysis with the cells' frequencies as priors, one class a cell;
* pixels: ridge regression;
* class: logistic regression.

All tokens are standardised first. Models of position and pixels are trained on some images and measured on others, and
so is the choice of how strongly they are regularised: tokens of one image resemble each other. The strength is a
variance that is added to that of each standardised token dimension, in both models.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

SEEDS: Final = (0, 1, 2, 3, 4)
HELD_OUT: Final = 0.3  # share of the images that a model is measured on
MIN_IMAGES: Final = 10  # at least 3 are held out
MIN_TOKENS: Final = 100  # about 30 are held out: one of them moves the accuracy by about 3 points
MIN_CLASSES: Final = 2
MIN_CLASS_IMAGES: Final = 4  # at least one is held out, and two or more are trained on
STRENGTHS: Final = (100.0, 1.0, 1e-1, 1e-2, 1e-4, 1e-6)  # of regularisation; of equally good ones the first is taken
_MAX_ITERATIONS: Final = 2000

Floats = NDArray[np.floating[Any]]
Codes = NDArray[np.int64]
Split = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True)
class Spread:
    """A figure over several splits.

    Attributes:
        mean: over the splits.
        deviation: their population standard deviation, at least 0; 0 for one split.
    """

    mean: float
    deviation: float

    @classmethod
    def over(cls, figures: Sequence[float]) -> "Spread":
        """The spread of the figures of at least one split."""
        return cls(float(np.mean(figures)), float(np.std(figures)))


@dataclass(frozen=True)
class Skipped:
    """A probe that could not be run.

    Attributes:
        reason: what it needs, and what was found.
    """

    reason: str


@dataclass(frozen=True)
class PositionProbe:
    """How well a token tells which cell of the raster it is of.

    Attributes:
        accuracy: share of held-out tokens whose cell is predicted, in percent. Tokens of cells that no token of the
            training part is of count as wrong.
        distance: from the predicted to the true cell, in cells, Euclidean, mean over the held-out tokens.
        chance: accuracy in percent of always saying the most frequent cell of the training part.
        tokens: how many there were, trained on or held out.
        images: how many they were of.
    """

    accuracy: Spread
    distance: Spread
    chance: Spread
    tokens: int
    images: int


@dataclass(frozen=True)
class PixelProbe:
    """How well a token tells the pixels of its patch.

    Attributes:
        error: L2 norm of predicted minus true pixels, in the pixels' unit, mean over the held-out tokens.
        baseline: the same, of always saying the mean pixels of the training part.
        tokens: how many there were, trained on or held out.
        images: how many they were of.
    """

    error: Spread
    baseline: Spread
    tokens: int
    images: int


@dataclass(frozen=True)
class ClassProbe:
    """How well one token of an image tells the image's class.

    Attributes:
        accuracy: share of held-out images whose class is predicted, in percent.
        chance: the same, of always saying the most frequent class of the training part.
        images: how many there were, trained on or held out, without those of classes that were left out.
        classes: how many they were of.
    """

    accuracy: Spread
    chance: Spread
    images: int
    classes: int


def probe_position(
    tokens: Floats, cells: NDArray[np.integer[Any]], images: NDArray[np.integer[Any]], seeds: Sequence[int] = SEEDS
) -> PositionProbe | Skipped:
    """Measure how well the position of tokens can be read off them.

    Args:
        tokens: shape (n, D), of any scale.
        cells: row and column of each token on a raster common to all images, shape (n, 2), integers.
        images: which image each token is of, shape (n,), integers.
        seeds: of the splits into 70 % and 30 % of the images, one each.

    Returns:
        The figures, or why there are none: too few images, tokens or different cells.

    Raises:
        ValueError: if shapes do not match, tokens are not finite, or there is no seed.
    """
    _check_seeds(seeds)
    _check_rows("tokens", tokens, len(images))
    if cells.shape != (len(images), 2):
        raise ValueError(f"expected cells of shape ({len(images)}, 2), not {cells.shape}")
    if skipped := _too_few(images):
        return skipped
    raster, inverse = np.unique(cells, axis=0, return_inverse=True)
    if len(raster) < 2:
        return Skipped(f"needs tokens of at least 2 different cells, found {len(raster)}")
    codes = inverse.reshape(-1).astype(np.int64)
    figures = [_measure_position(tokens, codes, raster, images, seed) for seed in seeds]
    accuracy, distance, chance = (Spread.over(figure) for figure in zip(*figures, strict=True))
    return PositionProbe(accuracy, distance, chance, len(images), np.unique(images).size)


def probe_pixels(
    tokens: Floats, pixels: Floats, images: NDArray[np.integer[Any]], seeds: Sequence[int] = SEEDS
) -> PixelProbe | Skipped:
    """Measure how well the pixels of patches can be read off their tokens.

    Args:
        tokens: shape (n, D), of any scale.
        pixels: of each token's patch, shape (n, P), in any unit.
        images: which image each token is of, shape (n,), integers.
        seeds: of the splits into 70 % and 30 % of the images, one each.

    Returns:
        The figures, or why there are none: too few images or tokens.

    Raises:
        ValueError: if shapes do not match, tokens or pixels are not finite, or there is no seed.
    """
    _check_seeds(seeds)
    _check_rows("tokens", tokens, len(images))
    _check_rows("pixels", pixels, len(images))
    if skipped := _too_few(images):
        return skipped
    figures = [_measure_pixels(tokens, pixels, images, seed) for seed in seeds]
    error, baseline = (Spread.over(figure) for figure in zip(*figures, strict=True))
    return PixelProbe(error, baseline, len(images), np.unique(images).size)


def probe_classes(
    tokens: Mapping[str, Floats], labels: ArrayLike, seeds: Sequence[int] = SEEDS
) -> dict[str, ClassProbe] | Skipped:
    """Measure how well the class of images can be read off one token of each, for several kinds of token.

    Images of classes with fewer than 4 images are left out. All kinds see the same splits.

    Args:
        tokens: of each kind, shape (images, D), of any scale; one row an image, the same images in all kinds.
        labels: the class of each image, shape (images,), integers or strings.
        seeds: of the splits into 70 % and 30 % of the images, one each, stratified by class.

    Returns:
        The figures of each kind, in the order of ``tokens``; or why there are none: too few classes or images.

    Raises:
        ValueError: if shapes do not match, tokens are not finite, or there is no seed.
    """
    _check_seeds(seeds)
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise ValueError(f"expected labels of shape (images,), not {labels.shape}")
    for kind, rows in tokens.items():
        _check_rows(f"tokens of kind {kind!r}", rows, len(labels))
    _, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    kept = counts[codes] >= MIN_CLASS_IMAGES
    codes, classes = codes[kept].astype(np.int64), int((counts >= MIN_CLASS_IMAGES).sum())
    if classes < MIN_CLASSES:
        return Skipped(f"needs at least {MIN_CLASSES} classes of at least {MIN_CLASS_IMAGES} images, found {classes}")
    if codes.size < MIN_IMAGES:
        return Skipped(
            f"needs at least {MIN_IMAGES} images of classes of at least {MIN_CLASS_IMAGES}, found {codes.size}"
        )
    splits = [_split_by_class(codes, seed) for seed in seeds]
    chance = Spread.over([_chance(codes, split) for split in splits])
    accuracies = {
        kind: Spread.over([_measure_classes(rows[kept], codes, split) for split in splits])
        for kind, rows in tokens.items()
    }
    return {kind: ClassProbe(accuracy, chance, codes.size, classes) for kind, accuracy in accuracies.items()}


class _Model(Protocol):
    """What is needed of a fitted scikit-learn model."""

    def predict(self, tokens: Floats, /) -> NDArray[Any]: ...


def _measure_position(
    tokens: Floats, codes: Codes, raster: NDArray[np.integer[Any]], images: NDArray[np.integer[Any]], seed: int
) -> tuple[float, float, float]:
    """Accuracy, distance and chance of one split; codes (n,) are rows of the raster (cells, 2)."""
    train, held_out = split = _split_by_image(images, seed)
    model = _fit_best(_fit_position, _error_rate, tokens[train], codes[train], images[train], seed)
    predicted, true = _predict(model, tokens[held_out]), codes[held_out]
    accuracy = 100 * float(np.mean(predicted == true))
    return accuracy, _mean_distance(raster[predicted], raster[true]), _chance(codes, split)


def _measure_pixels(tokens: Floats, pixels: Floats, images: NDArray[np.integer[Any]], seed: int) -> tuple[float, float]:
    """Error and baseline of one split."""
    train, held_out = _split_by_image(images, seed)
    pixels = pixels.astype(np.float64)
    model = _fit_best(_fit_pixels, _mean_distance, tokens[train], pixels[train], images[train], seed)
    error = _mean_distance(_predict(model, tokens[held_out]), pixels[held_out])
    return error, _mean_distance(pixels[train].mean(axis=0), pixels[held_out])


def _measure_classes(tokens: Floats, codes: Codes, split: Split) -> float:
    """Accuracy of one split, in percent."""
    train, held_out = split
    predicted = _predict(_fit_classes(_doubles(tokens[train]), codes[train]), tokens[held_out])
    return 100 * float(np.mean(predicted == codes[held_out]))


def _chance(codes: Codes, split: Split) -> float:
    """Percentage of held-out codes that are the most frequent one of the training part, the lowest of several."""
    train, held_out = split
    return 100 * float(np.mean(codes[held_out] == np.bincount(codes[train]).argmax()))


def _error_rate(predicted: NDArray[Any], true: NDArray[Any]) -> float:
    return float(np.mean(predicted != true))


def _mean_distance(predicted: NDArray[Any], true: NDArray[Any]) -> float:
    """Mean Euclidean distance between rows, shape (n, d) each, or (d,) for the same one throughout."""
    return float(np.linalg.norm(predicted - true, axis=1).mean())


def _split_by_image(images: NDArray[np.integer[Any]], seed: int) -> Split:
    """Indices of the tokens of 70 % of the images and of those of the rest."""
    from sklearn.model_selection import GroupShuffleSplit

    splitter = GroupShuffleSplit(n_splits=1, test_size=HELD_OUT, random_state=seed)
    train, held_out = next(splitter.split(images, groups=images))
    return train, held_out


def _split_by_class(codes: Codes, seed: int) -> Split:
    """Indices of 70 % of the images of each class, or about that, and of the rest."""
    from sklearn.model_selection import StratifiedShuffleSplit

    splitter = StratifiedShuffleSplit(n_splits=1, test_size=HELD_OUT, random_state=seed)
    train, held_out = next(splitter.split(codes, codes))
    return train, held_out


def _fit_best(
    fit: Callable[[Floats, NDArray[Any], float], _Model],
    loss: Callable[[NDArray[Any], NDArray[Any]], float],
    tokens: Floats,
    targets: NDArray[Any],
    images: NDArray[np.integer[Any]],
    seed: int,
) -> _Model:
    """Fit with the strength that does best when 30 % of these images are held out."""
    tokens = _doubles(tokens)
    train, held_out = _split_by_image(images, seed)
    losses = []
    for strength in STRENGTHS:
        model = fit(tokens[train], targets[train], strength)
        losses.append(loss(model.predict(tokens[held_out]), targets[held_out]))
    return fit(tokens, targets, STRENGTHS[int(np.argmin(losses))])


def _fit_position(tokens: Floats, codes: NDArray[Any], strength: float) -> _Model:
    """A classifier into cells; tokens (n, D), codes (n,)."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.neighbors import KNeighborsClassifier

    if np.unique(codes).size in (1, codes.size):  # there is one cell, or no variance within cells to estimate
        return _fit_standardised(KNeighborsClassifier(n_neighbors=1), tokens, codes)
    covariance = _RegularisedCovariance(strength)
    return _fit_standardised(LinearDiscriminantAnalysis(solver="lsqr", covariance_estimator=covariance), tokens, codes)


def _fit_pixels(tokens: Floats, pixels: NDArray[Any], strength: float) -> _Model:
    """A regression of pixels; tokens (n, D), pixels (n, P)."""
    from sklearn.linear_model import Ridge

    return _fit_standardised(Ridge(strength * len(tokens), solver="cholesky"), tokens, pixels)


def _fit_classes(tokens: Floats, codes: Codes) -> _Model:
    """A classifier into classes; tokens (n, D), codes (n,)."""
    from sklearn.linear_model import LogisticRegression

    return _fit_standardised(LogisticRegression(max_iter=_MAX_ITERATIONS), tokens, codes)


def _fit_standardised(estimator: Any, tokens: Floats, targets: NDArray[Any]) -> _Model:
    """Fit a scikit-learn estimator on tokens of mean 0 and variance 1 in each dimension."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), estimator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The number of unique classes is greater")  # cells that few tokens are of
        fitted: _Model = model.fit(tokens, targets)
    return fitted


def _predict(model: _Model, tokens: Floats) -> NDArray[Any]:
    return model.predict(_doubles(tokens))


class _RegularisedCovariance:
    """The covariance of a class plus a variance in all directions, as discriminant analysis asks for it.

    scikit-learn's own shrinkage is relative to the variance within classes, so it does nothing where there is none:
    where tokens are exact codes of their cells.

    Attributes:
        covariance_: shape (D, D); there after `fit`.
    """

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def fit(self, tokens: NDArray[np.float64]) -> "_RegularisedCovariance":
        """Estimate it from the tokens of one class, shape (n, D), n at least 1."""
        residuals = tokens - tokens.mean(axis=0)
        self.covariance_ = (residuals.T / len(tokens)) @ residuals
        np.fill_diagonal(self.covariance_, self.covariance_.diagonal() + self.strength)
        return self


def _doubles(tokens: Floats) -> NDArray[np.float64]:
    return tokens.astype(np.float64, copy=False)


def _check_seeds(seeds: Sequence[int]) -> None:
    """Raise `ValueError` unless there is a seed."""
    if not seeds:
        raise ValueError("expected at least one seed, found none")


def _check_rows(name: str, rows: Floats, count: int) -> None:
    """Raise `ValueError` unless these are so many rows of finite numbers."""
    if rows.ndim != 2 or len(rows) != count or not rows.shape[1]:
        raise ValueError(f"expected {name} of shape ({count}, dimensions), not {rows.shape}")
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise ValueError(f"expected finite {name}, but {count - finite.sum()} of {count} rows are not")


def _too_few(images: NDArray[np.integer[Any]]) -> Skipped | None:
    """Why a probe cannot be run on one token of each of these images, if so; images (n,)."""
    different = np.unique(images).size
    if different < MIN_IMAGES:
        return Skipped(f"needs tokens of at least {MIN_IMAGES} images, found {different}")
    if len(images) < MIN_TOKENS:
        return Skipped(f"needs at least {MIN_TOKENS} tokens, found {len(images)}")
    return None
