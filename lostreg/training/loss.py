"""How far a student's tokens are from what the teacher says of the patches that it saw."""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from lostreg.training.processes import ALONE, Processes

_ALIKE: Final = 4.0  # medians of the gap between a look and its views from which only the views count
_SMALLEST: Final = 1e-6


@dataclass(frozen=True)
class Targets:
    """What a student's tokens are to be in one process's share of a batch.

    Attributes:
        seen: which patches some view of the teacher reaches, shape (B, N).
        tokens: of these patches, before the final norm, shape (patches, D).
        mean_square: of the targets of the whole batch, shape ().
        weight: of the means over this share, so that the mean of all processes is that over the batch; shape ().
    """

    seen: Tensor
    tokens: Tensor
    mean_square: Tensor
    weight: Tensor


def targets_of(own: Tensor, agreed: Tensor, norm: nn.Module, processes: Processes = ALONE) -> Targets:
    """What views agree on, where they differ from the teacher's own look.

    What views do not agree on is an artifact of the straight look, and what they agree on is to be left as it is. With
    the gap g of a patch, 1 - cosine(own, agreed) after the final norm, its target is own + m (agreed - own),
    m = min(1, g / (4 median g)).

    Args:
        own: tokens of the teacher's own look at windows, before the final norm, shape (B, N, D).
        agreed: over its views, of the same shape; not a number where no view reaches.
        norm: the teacher's final one.
        processes: that have a share of the batch each, of as many windows; all call this.
    """
    seen = agreed[..., 0].isfinite()
    own, agreed = own[seen].float(), agreed[seen].float()
    gap = 1 - functional.cosine_similarity(norm(own), norm(agreed), dim=-1)
    gaps = processes.gather(torch.full(seen.shape, torch.nan, device=gap.device).masked_scatter(seen, gap))
    median = gaps[~gaps.isnan()].median()
    target = own + (gap / (_ALIKE * median).clamp(min=_SMALLEST)).clamp(max=1)[:, None] * (agreed - own)
    count = seen.sum().float()
    weight = count / processes.mean(count)
    return Targets(seen, target, processes.mean(weight * target.square().mean()), weight)


def losses(tokens: Tensor, targets: Targets, norms: tuple[nn.Module, nn.Module]) -> tuple[Tensor, Tensor]:
    """What is to become small.

    Args:
        tokens: of the student before the final norm, shape (B, N, D).
        targets: of the same windows.
        norms: the student's final norm, and the teacher's.

    Returns:
        Mean of 1 - cosine over patches, after the final norms, and the squared error before them over the mean square
        of the targets: a norm hides how long a token is, and artifacts are long. Neither depends on the backbone's
        scale. Of several processes each has a part, and the mean of the parts is the loss of the batch.
    """
    tokens = tokens[targets.seen].float()
    cosine = 1 - functional.cosine_similarity(norms[0](tokens), norms[1](targets.tokens), dim=-1)
    square = functional.mse_loss(tokens, targets.tokens) / targets.mean_square
    return targets.weight * cosine.mean(), targets.weight * square
