"""One image whose features stay at hand: LOST runs on them again and again, without another forward."""

import dataclasses
from typing import Any, Literal

from lostreg.errors import ImageError
from lostreg.images.decode import ImageSource
from lostreg.inference.discoverer import Discoverer
from lostreg.inference.discovery import Discovery
from lostreg.inference.jobs import FeaturesJob
from lostreg.inference.postprocess import BoxFrom, discoveries
from lostreg.methods.bias import check_bias, resolve_normalize
from lostreg.methods.lost import ObjectMaps, object_maps, prepare


class Study:
    """The features of one image, for trying biases and numbers of objects on it.

    Args:
        discoverer: the backbone, the feature, and how images are read.
        image: a file, a PIL image, or an RGB array (h, w, 3) of uint8.

    Raises:
        ImageError: if the image cannot be read, or memory does not suffice for it.
    """

    def __init__(self, discoverer: Discoverer, image: ImageSource) -> None:
        (outcome,) = discoverer.stream_of(FeaturesJob(discoverer.engine)).outcomes([image])
        if isinstance(outcome, ImageError):
            raise outcome
        self.discoverer = discoverer
        self.picture, self._features = outcome
        self._source = image

    def discover(
        self,
        *,
        bias: float | Literal["auto"] | None = None,
        max_objects: int | None = None,
        min_score: float | None = None,
        refine: bool | None = None,
        box_from: BoxFrom | None = None,
    ) -> Discovery:
        """Run LOST on the features. What is None is as the discoverer has it.

        Args:
            bias: Gram bias, or ``auto``, which normalises the features whatever the discoverer does.
            max_objects: as for `Discoverer`, like the rest.
            min_score: of further objects.
            refine: whether masks are sharpened on the pixels.
            box_from: ``patches`` or ``mask``.

        Raises:
            OptionError: if an option is out of its range.
        """
        discoverer = self.discoverer
        if bias is None:
            bias = discoverer.bias
        check_bias(bias)
        given = {"max_objects": max_objects, "min_score": min_score, "refine": refine, "box_from": box_from}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        asked = dataclasses.replace(discoverer.object_options, **changes)
        normalize = resolve_normalize(bias, discoverer.normalize or None, default=False)
        features = prepare(self._features[None], normalize=normalize)
        grid = self.picture.grid
        maps = object_maps(features, grid, bias, discoverer.k_patches)
        objects = ObjectMaps.unpack(maps.pack().cpu()).objects(features, grid)
        patch_size = discoverer.backbone.spec.patch_size
        (found,) = discoveries(objects, [self.picture], patch_size, discoverer.k_patches, asked)
        return dataclasses.replace(found, source=self._source, exif=discoverer.exif)
