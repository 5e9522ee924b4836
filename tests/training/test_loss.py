"""The loss: which patches are to change, and by how much."""

import pytest
import torch

from lostreg.training.loss import losses, targets_of


def test_targets_are_the_own_look_where_views_agree_and_theirs_where_not() -> None:
    norm = torch.nn.Identity()

    def loss(tokens: torch.Tensor) -> float:
        return float(sum(losses(tokens, targets_of(own, agreed, norm), (norm, norm))))

    own = torch.eye(8)[None].repeat(1, 4, 1) + 0.01
    agreed = own.clone()
    agreed[:, :, 0] += 0.02
    agreed[0, 5] = -own[0, 5]
    right = own.clone()
    right[0, 5] = agreed[0, 5]
    assert loss(right) < loss(agreed) < loss(own)
    agreed[0, 9] = torch.nan
    assert loss(right) < loss(agreed.nan_to_num()) < loss(own)
    agreed = own
    assert loss(own) == pytest.approx(0, abs=1e-6)
