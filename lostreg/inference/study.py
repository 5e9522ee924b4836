"""One image whose features stay at hand: LOST runs on them again and again, without another forward."""

import dataclasses
from typing import Any

from lostreg.errors import ImageError
from lostreg.images.decode import ImageSource, held
from lostreg.inference.discoverer import Discoverer
from lostreg.inference.discovery import Discovery
from lostreg.inference.methods import METHODS
from lostreg.inference.postprocess import discoveries
from lostreg.methods.lost import prepare


class Study:
    """The features of one image, for trying biases and numbers of objects on it.

    Args:
        discoverer: the backbone, the feature, and how images are read.
        image: a file, a PIL image, or an RGB array (h, w, 3) of uint8.

    Raises:
        ImageError: if the image cannot be read, or memory does not suffice for it.

    Example:
        >>> study = lostreg.Study(lostreg.Discoverer("dinov2_vits14_reg", device="cpu"), "dog.jpg")
        >>> [study.discover(bias=bias).degrees.shape for bias in ("auto", -0.5)]
        [(8, 11), (8, 11)]
    """

    def __init__(self, discoverer: Discoverer, image: ImageSource) -> None:
        image = held(image)
        (outcome,) = discoverer.stream_of(discoverer.features).outcomes([image])
        if isinstance(outcome, ImageError):
            raise outcome
        self.discoverer = discoverer
        self.picture, self._features = outcome
        self._source = image

    def discover(self, **changes: Any) -> Discovery:
        """Run LOST on the features.

        Args:
            changes: options in place of the discoverer's, as its keywords: ``bias``, ``k_patches``, ``max_objects``,
                ``min_score``, ``refine`` and ``box_from``. What is None is as the discoverer has it. The bias ``auto``
                normalises the features whatever the discoverer does.

        Raises:
            OptionError: if an option is out of its range, or needs another forward.
        """
        options = self.discoverer.options.with_changes(changes)
        normalize = options.bias == "auto" or options.normalize
        first, *beside = self._features
        features = [prepare(first[None], normalize=normalize), *(one[None] for one in beside)]
        method = METHODS[options.method].make(options, features[0].device)
        ((maps,),) = method.search([features], [self.picture.grid])
        found = maps.to_host(wait=True).candidates(features[0], self.picture.grid)
        (discovery,) = discoveries(found, [self.picture], self.discoverer.backbone.spec.patch_size, options)
        return dataclasses.replace(discovery, source=self._source)
