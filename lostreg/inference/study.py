"""One image whose features stay at hand: methods run on them again and again, without another forward."""

import dataclasses
from typing import Any

from torch import Tensor

from lostreg.errors import ImageError
from lostreg.images.decode import ImageSource, held
from lostreg.inference.discoverer import Discoverer, check_discoverer
from lostreg.inference.discovery import Discovery
from lostreg.inference.jobs import FeaturesJob
from lostreg.inference.methods import METHODS, wanted_features
from lostreg.inference.options import ResolvedOptions
from lostreg.inference.postprocess import discoveries
from lostreg.methods.lost import prepare
from lostreg.models.features import Inside
from lostreg.models.table import Feature


class Study:
    """The features of one image, for trying methods, biases and numbers of objects on it.

    Args:
        discoverer: the backbone, the feature, and how images are read.
        image: a file, a PIL image, or an RGB array (h, w, 3) of uint8 (not OpenCV's BGR).

    Raises:
        ImageError: if the image cannot be read, or memory does not suffice for it.

    Example:
        >>> study = lostreg.Study(lostreg.Discoverer("dinov2_vits14_reg", device="cpu"), "dog.jpg")
        >>> [study.discover(bias=bias).degrees.shape for bias in ("auto", -0.5)]
        [(8, 11), (8, 11)]
    """

    def __init__(self, discoverer: Discoverer, image: ImageSource) -> None:
        check_discoverer(discoverer, "a Discoverer and then an image")
        self.discoverer = discoverer
        self._source = held(image)
        self._kept: dict[tuple[Feature | Inside, int], Tensor] = {}
        self._features(discoverer.options)

    def discover(self, **changes: Any) -> Discovery:
        """Look for objects in the features.

        Args:
            changes: options in place of the discoverer's, as its keywords: ``method``, ``bias``, ``k_patches``,
                ``max_objects``, ``min_score``, ``score``, ``refine`` and ``box_from``. What is None is as the
                discoverer has it. Features are normalised where the method or the bias ``auto`` needs it, whatever the
                discoverer does. The first ``dinoseg`` of a discoverer with another method takes one more forward, as it
                reads attention.

        Raises:
            OptionError: if an option is out of its range, or needs another forward, or the method cannot be had of this
                backbone.
            ImageError: if the image is needed again, and cannot be read any more.
        """
        backbone = self.discoverer.backbone
        options = self.discoverer.options.with_changes(changes).resolved(backbone)
        first, *beside = self._features(options)
        features = [prepare(first[None], normalize=options.normalize), *(one[None] for one in beside)]
        method = METHODS[options.method].make(options, features[0].device)
        ((maps,),) = method([features], [self.picture.grid])
        found = maps.to_host(wait=True).candidates(features[0], self.picture.grid)
        (discovery,) = discoveries(found, [self.picture], backbone.spec.patch_size, options)
        return dataclasses.replace(discovery, source=self._source)

    def _features(self, options: ResolvedOptions) -> list[Tensor]:
        """What the options' method reads, (N, D) each; a forward where not all of it is kept."""
        wanted = wanted_features(options)
        missing = [pair for pair in wanted if pair not in self._kept]
        if missing:
            job = FeaturesJob(self.discoverer.backbone, missing, compiled=options.compile)
            (outcome,) = self.discoverer.stream_of(job).outcomes([self._source])
            if isinstance(outcome, ImageError):
                raise outcome
            self.picture, found = outcome
            self._kept |= zip(missing, found, strict=True)
        return [self._kept[pair] for pair in wanted]
