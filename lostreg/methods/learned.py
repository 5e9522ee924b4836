"""What a collection teaches about its objects, without labels: how likely a patch is part of one.

    p(x) = 1 / (1 + exp(-(w · x/|x| + b)))          x: output tokens of the backbone's last layer
    rank(M) = (mean of p in M)² · (1 - mean of p around M)

w and b separate what the best candidates of many images hold from what they leave: a balanced logistic regression, each
image weighing as much as its candidate's score. One image's candidate may be wrong; what many agree on seldom is. The
map is linear, so that it cannot learn mistakes by heart. What surrounds a candidate, see
`lostreg.methods.objectness.surroundings`, tells a part from a whole: around a part the object goes on. All else is left
out of it, since other objects further away say nothing against this one.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lostreg.errors import OptionError
from lostreg.methods.exact import exact_float32
from lostreg.methods.lost import prepare
from lostreg.methods.objectness import surroundings

_PENALTY: Final = 1e-2
_PATCHES: Final = 64  # of an image that take part
_LEAST_DEVIATION: Final = 1e-6  # of a dimension: what is the same in all tokens is not blown up

Mask = NDArray[np.bool_]
Sample = tuple[Tensor, Mask, NDArray[np.float64]]  # tokens, (n, D), which the best candidate holds, and weights, (n,)
Teacher = tuple[Tensor, Mask, NDArray[np.float32]]  # tokens, candidates, and their scores


@dataclass(frozen=True)
class LinearObjectness:
    """A linear map from a patch's token to how likely the patch is part of an object.

    Attributes:
        weight: shape (D,), float32.
        bias: a number.
    """

    weight: Tensor
    bias: float

    def to(self, device: torch.device) -> "LinearObjectness":
        """The same on a device."""
        return replace(self, weight=self.weight.to(device))

    @torch.no_grad()
    def probabilities(self, tokens: Tensor) -> Tensor:
        """How likely each patch is part of an object; only queued where tokens and map are on a GPU.

        Args:
            tokens: output tokens of the last layer, shape (..., N, D), any floating dtype, on the device of the map.

        Returns:
            Shape (..., N), float32, in [0, 1].
        """
        with exact_float32(tokens.device):
            rows = prepare(tokens, normalize=True)
            # Among others a row is as alone: `rows @ weight` would round it differently, and a sigmoid in float32, too.
            logits = (rows * self.weight.to(rows.device)).sum(dim=-1) + self.bias
            return torch.sigmoid(logits.double()).float()


def taught_ranks(probabilities: NDArray[np.float32], masks: Mask) -> NDArray[np.float32]:
    """By what the candidates of an image are ranked: (mean inside)² · (1 - mean around the box).

    Args:
        probabilities: of each patch, shape (N,), in [0, 1].
        masks: shape (P, h, w), bool; N = h * w.

    Returns:
        Shape (P,), float32, in [0, 1]; 0 for a mask that covers nothing. Nothing around counts as a mean of 0.
    """
    inside, around = (_means(probabilities, some) for some in (masks, surroundings(masks)))
    ranks: NDArray[np.float32] = inside**2 * (1 - around)
    return ranks


def _means(probabilities: NDArray[np.float32], masks: Mask) -> NDArray[np.float32]:
    members = masks.reshape(len(masks), len(probabilities)).astype(np.float32)
    means: NDArray[np.float32] = (members @ probabilities / np.maximum(members.sum(axis=1), 1)).clip(0, 1)
    return means


def fit(images: Iterable[Teacher]) -> LinearObjectness:
    """Learn from images without labels.

    Of each image an even sample of patches is kept, so memory grows with the number of images and no faster.

    Args:
        images: of each image the output tokens of the last layer, shape (N, D), on any device; its candidates' masks,
            shape (P, h, w), bool, N = h * w; and their scores, shape (P,), in [0, 1]. Images where all scores are 0
            teach nothing.

    Returns:
        A `LinearObjectness` on the CPU: the same for the same images in the same order.

    Raises:
        OptionError: if no image teaches anything, or tokens are not finite or of different dimensions.

    Example:
        >>> tokens = torch.randn(20, 8)
        >>> mask = tokens[:, 0].view(4, 5).numpy() > 0
        >>> objectness = lostreg.methods.learned.fit([(tokens, mask[None], np.ones(1, np.float32))])
        >>> bool((objectness.probabilities(tokens).view(4, 5).numpy() > 0.5)[mask].all())
        True
    """
    samples = [_sample(*image) for image in images if image[2].max() > 0]
    if not samples:
        raise OptionError("expected at least one image with a candidate whose score is above 0")
    dimensions = sorted({tokens.shape[1] for tokens, _, _ in samples})
    if len(dimensions) > 1:
        raise OptionError(f"expected tokens of as many dimensions in each image, not {dimensions}")
    tokens = torch.cat([tokens for tokens, _, _ in samples])
    if not tokens.isfinite().all():
        raise OptionError("tokens must be finite, in float32 too (what is too large for fp16 may fit bf16)")
    deviation, mean = torch.std_mean(tokens, dim=0, correction=0)
    deviation = deviation.clamp(min=_LEAST_DEVIATION)
    targets, weights = (np.concatenate(column) for column in list(zip(*samples, strict=True))[1:])
    weight, bias = _logistic_regression(tokens.sub_(mean).div_(deviation), targets, weights)
    weight = weight / deviation
    return LinearObjectness(weight, bias - float(weight @ mean))


def _sample(tokens: Tensor, masks: Mask, scores: NDArray[np.float32]) -> Sample:
    """Patches of one image, drawn with a fixed seed."""
    picked = np.sort(np.random.default_rng(0).permutation(len(tokens))[:_PATCHES])
    sample = prepare(tokens[torch.from_numpy(picked).to(tokens.device)], normalize=True).cpu()
    best = scores.argmax()
    return sample, masks[best].ravel()[picked], np.full(len(picked), scores[best], dtype=np.float64)


def _logistic_regression(
    rows: Tensor, targets: NDArray[np.bool_], weights: NDArray[np.float64]
) -> tuple[Tensor, float]:
    """The map that minimises Σ_i a_i log(1 + exp(-y_i (w · x_i + b))) + λ/2 |w|², y_i in {-1, 1}.

    a_i are the weights, scaled so that those of either class add up to 1/2.
    """
    from scipy.optimize import minimize  # a second, which searches that learn nothing do without
    from scipy.special import expit

    signs = np.where(targets, 1.0, -1.0)
    shares = weights.copy()
    for side in (targets, ~targets):
        shares[side] /= max(2 * shares[side].sum(), np.finfo(np.float64).tiny)

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weight = torch.from_numpy(parameters[:-1]).float()
        margins = signs * ((rows @ weight).double().numpy() + parameters[-1])
        slopes = -signs * shares * expit(-margins)
        gradient = (torch.from_numpy(slopes).float() @ rows).double().numpy() + _PENALTY * parameters[:-1]
        value = shares @ np.logaddexp(0, -margins) + _PENALTY / 2 * parameters[:-1] @ parameters[:-1]
        return float(value), np.append(gradient, slopes.sum())

    found = minimize(loss, np.zeros(rows.shape[1] + 1), jac=True, method="L-BFGS-B").x
    return torch.from_numpy(found[:-1]).float(), float(found[-1])
