"""How much memory an image will need, and how much there is."""

from typing import Final

import torch

from lostreg.images.memory import host_bytes
from lostreg.methods.similarity import Similarities
from lostreg.models.backbone import Backbone

_MAP_BYTES: Final = 512  # a patch, for the degrees and masks of a few biases, with copies


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be had on a device, in bytes; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return host_bytes() if device.type == "cpu" else None


def required_bytes(backbone: Backbone, grid: tuple[int, int]) -> int:
    """An upper bound on what one image takes on the device, from decoded pixels to degrees, beside the model.

    Every term grows with the number of patches and none with its square, but for the similarities of images so small
    that they are kept: on a GPU up to 16,384 patches.

    Args:
        backbone: the model.
        grid: (h, w), rows and columns of patches.
    """
    count = grid[0] * grid[1]
    size = backbone.dtype.itemsize
    width = backbone.width
    pixels = 3 * backbone.spec.patch_size**2
    # Decoded, padded and cut; in float32; in the model's precision.
    embedding = count * pixels * (3 + 4 + size)
    # Tokens in float32; their norm, the projections, queries and keys once more where they are turned, attention's
    # output twice.
    forward = count * width * (4 + 8 * size)
    # Features, normalised features; degrees and masks; similarities.
    search = count * (width * (size + 3 * 4) + _MAP_BYTES) + Similarities.most_bytes(count, backbone.device)
    return max(embedding + count * width * 8, forward, search) + (512 << 20)
