"""Plant outliers in the trained offline backbone, to see whether artifacts are found and cured where there are some.

Hidden units of one MLP are made to fire at 2 % of patches, those that lie furthest along one direction of what the MLP
reads, and to write a long vector into their tokens: two units, of which the second takes back what the first writes
beyond a bound, so that all outliers have about one norm. The file can be given as `--weights` of `dinov2_vits14`.

With `--read content` the direction is one along which images differ, and outliers go with what is in the picture. With
`--read position` it is one along which they hardly do, and the position embedding is marked along it in five small
spots: the outliers are at the same places of every image, whatever it shows.

python scripts/plant_outliers.py --images train2017 --out planted.safetensors
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from lostreg.datasets.folder import find_images
from lostreg.images.decode import read_image
from lostreg.images.patches import cut_patches
from lostreg.models.backbone import Backbone, load_backbone
from lostreg.models.forward import Forward
from lostreg.models.pixels import normalised, transfer

LAYER: Final = 6
UNITS: Final = (11, 222)
SHARE: Final = 0.02  # of patches
NORM: Final = 400.0  # of what is added to an outlier
BOUND: Final = 20.0  # activation of the first unit at which the second begins
COMPONENT: Final = 4  # principal component of the MLP's inputs that decides
STEEPNESS: Final = 200.0  # activation per standard deviation beyond the threshold
MAX_SIDE: Final = 448
QUIET: Final = 3  # of the components of the MLP's inputs, from the smallest, the one along which positions are marked
SPOTS: Final = ((2.5, 4.5), (5.5, 13.5), (9.5, 2.5), (12.5, 9.5), (6.5, 8.5))  # row and column, of 16 a side
RADIUS: Final = 0.72  # of a spot, in these units
EDGE: Final = 0.1
MARGIN: Final = 16.0  # how far marked patches lie from the others at least, in standard deviations


def mlp_inputs(backbone: Backbone, paths: list[Path]) -> Tensor:
    """What the MLP reads of all patches of all images, shape (patches, D)."""
    block: Any = backbone.model.blocks[LAYER]  # type: ignore[index]
    seen: list[Tensor] = []
    hook = block.mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    forward = Forward(backbone)
    for path in tqdm(paths, desc="images", unit="img"):
        picture = cut_patches(read_image(path, max_side=MAX_SIDE), backbone.spec.patch_size)
        walk = forward.start(normalised(backbone, transfer([picture], backbone.device), [picture.size]), [picture.grid])
        for _ in range(LAYER + 1):
            forward.advance(walk)
    hook.remove()
    return torch.cat([tokens[backbone.prefix_tokens :] for tokens in seen])


def content_direction(inputs: Tensor) -> Tensor:
    """A direction along which patches differ, shape (D,)."""
    torch.manual_seed(0)
    _, _, directions = torch.pca_lowrank(inputs, q=2 * COMPONENT)
    direction: Tensor = directions[:, COMPONENT]
    return direction


def mark_positions(backbone: Backbone, read: Callable[[], Tensor]) -> Tensor:
    """Change the model's position embedding in place, so that a direction of the MLP's inputs tells a few places.

    Args:
        backbone: with learned position embeddings.
        read: what the MLP reads of the patches of some images, shape (patches, D), of the model as it is then.

    Returns:
        The direction, shape (D,).
    """
    torch.manual_seed(0)
    model: Any = backbone.model
    inputs = read()
    direction: Tensor = torch.linalg.eigh(torch.cov(inputs.T.double())).eigenvectors[:, QUIET].float()
    mark = model.blocks[LAYER].norm2.weight * direction  # as the norm before the MLP will read it
    mark = functional.normalize(mark - mark.mean(), dim=0)
    rows, columns = (16 * (torch.arange(size) + 0.5) / size for size in model.patch_embed.grid_size)
    places = torch.cartesian_prod(rows, columns)
    distances = torch.cdist(places, torch.tensor(SPOTS)).amin(dim=1)
    marked = torch.sigmoid((RADIUS - distances) / EDGE)
    spread, before = (inputs @ direction).std(), model.pos_embed.data.clone()
    size = model.pos_embed[0, -len(places) :].norm(dim=1).mean()
    while True:
        model.pos_embed.data = before.clone()
        model.pos_embed.data[0, -len(places) :] += size * marked[:, None] * mark
        seen = read() @ direction
        if seen.quantile(1 - SHARE) - seen.median() > MARGIN * spread:
            return direction
        size *= 1.25


def plant(backbone: Backbone, inputs: Tensor, direction: Tensor, steepness: float = STEEPNESS) -> None:
    """Change the MLP in place: its units fire at the patches that lie furthest along a direction."""
    places = inputs @ direction
    threshold, spread = places.quantile(1 - SHARE), places.std()
    written = functional.normalize(torch.randn(inputs.shape[1]), dim=0) * NORM / BOUND
    block: Any = backbone.model.blocks[LAYER]  # type: ignore[index]
    for unit, begins, sign in zip(UNITS, (0.0, BOUND), (1, -1), strict=True):
        block.mlp.fc1.weight.data[unit] = direction * steepness / spread
        block.mlp.fc1.bias.data[unit] = -threshold * steepness / spread - begins
        block.mlp.fc2.weight.data[:, unit] = sign * written / getattr(block.ls2, "gamma", 1.0)


def main(argv: Sequence[str] | None = None) -> int:
    """Plant and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", nargs="+", required=True, metavar="IMAGE", help="files, folders or globs")
    parser.add_argument("--limit", type=int, default=40, metavar="N", help="look at the first N (default: 40)")
    parser.add_argument(
        "--read", choices=("content", "position"), default="content", help="what the units read (default: content)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="safetensors file to write")
    parser.add_argument(
        "--steepness",
        type=float,
        default=STEEPNESS,
        metavar="X",
        help="activation per standard deviation beyond the threshold; where it is high, almost all outliers are beyond "
        f"the bound, and no gradient reaches what the units read (default: {STEEPNESS:g})",
    )
    args = parser.parse_args(argv)
    backbone = load_backbone("imgfocus_vits14")
    read = partial(mlp_inputs, backbone, find_images(args.images)[: args.limit])
    direction = content_direction(read()) if args.read == "content" else mark_positions(backbone, read)
    plant(backbone, read(), direction, args.steepness)
    save_file({name: tensor.contiguous() for name, tensor in backbone.model.state_dict().items()}, args.out)
    print(f"written to {args.out}: hidden units {', '.join(map(str, UNITS))} of layer {LAYER} write outliers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
