"""What tests of several commands share."""

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lostreg.cli.terminal import told
from lostreg.models.backbone import Backbone, build_backbone, find_spec


@pytest.fixture
def on_terminal() -> Iterator[None]:
    """What parts of commands tell stands on standard error, as it does within `main`."""
    with told(logging.INFO):
        yield


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
