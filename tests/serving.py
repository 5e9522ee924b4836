"""A demo with small random backbones, served from a thread of the test."""

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from lostreg.defaults import MAX_PIXELS
from lostreg.demo.server import address_of, is_local, listen, make_server, upload_folder
from lostreg.demo.session import DemoSettings, Models
from lostreg.inference.objectness import Objectness
from lostreg.inference.options import Options
from lostreg.models.backbone import Backbone, build_backbone, find_spec
from lostreg.models.registers import RegisterNeurons

FIRST, SECOND, NO_TOKEN = "imgfocus_vits14", "dinov2_vits14_reg", "siglip2_vitb16"
NEURONS = RegisterNeurons(((0, 3), (1, 5)), count=2, backbone=FIRST)
_small: dict[str, Backbone] = {}


def small(name: str, **_: Any) -> Backbone:
    """Two random blocks."""
    if name not in _small:
        torch.manual_seed(0)
        _small[name] = build_backbone(find_spec(name), depth=2)
    return copy.deepcopy(_small[name])  # the caller may change what it has loaded


@contextmanager
def small_models(
    max_pixels: int = MAX_PIXELS, objectness: Objectness | None = None, **settings: Any
) -> Iterator[Models]:
    """Models of a demo on this machine's CPU."""
    options = Options(bias="auto", method="parts", objectness=objectness, device="cpu", max_pixels=max_pixels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lostreg.inference.discoverer.load_backbone", small)
        yield Models(DemoSettings((FIRST, SECOND, NO_TOKEN), options, **settings))


@contextmanager
def served(**options: Any) -> Iterator[str]:
    """The address of a demo that is ready."""
    with small_models(**options) as models, upload_folder() as uploads:
        bound = listen("127.0.0.1", 0)
        server = make_server(models.settings, uploads, models, is_local(bound))
        ready = threading.Event()
        server.on_ready = ready.set
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        try:
            assert ready.wait(60)
            yield address_of(bound)
        finally:
            server.should_exit = True
            thread.join(60)
            bound.close()
