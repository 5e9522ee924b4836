"""What tests of several commands share."""

import copy
from typing import Any

import pytest
import torch

from lostreg.models.backbone import Backbone, build_backbone, find_spec

_small: list[Backbone] = []


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever backbone is asked for is one of two random blocks: the command line is tested, not what is found."""

    def load(name: str, **_: Any) -> Backbone:
        if not _small:
            torch.manual_seed(0)
            _small.append(build_backbone(find_spec(name), depth=2))
        return copy.deepcopy(_small[0])  # the caller may change what it has loaded

    monkeypatch.setattr("lostreg.inference.discoverer.load_backbone", load)
