"""Measure how near the teacher of `registers train`, and what it trained, come to a model before outliers were planted.

The model before is `imgfocus_vits14`; planted weights come from `scripts/plant_outliers.py`. Nearness is the mean
cosine of patch tokens after the final norm, at planted patches (norms above 150) and at all others, over square windows
of images that begin at `--skip`.

python scripts/trained_registers.py --images train2017 --planted planted.safetensors --trained registers.safetensors
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from lostreg.datasets.folder import find_images
from lostreg.images.decode import Picture, read_image
from lostreg.images.patches import cut_patches
from lostreg.jsonio import write_json
from lostreg.models.backbone import Backbone, load_backbone
from lostreg.models.table import BACKBONES
from lostreg.training.teacher import Teacher, pixels_of, square
from lostreg.training.views import AGGREGATES, Layout, crop, draw_views, lay_back

ROW: Final = "dinov2_vits14"  # that weights are given to
OUTLIER: Final = 150.0
VIEWS: Final = (5, 10, 20, 40)


class Nearness:
    """Cosines to the model before, kept apart for planted patches and others."""

    def __init__(self) -> None:
        self._cosines: dict[str, tuple[list[Tensor], list[Tensor]]] = {}

    def add(self, name: str, tokens: Tensor, before: Tensor, planted: Tensor) -> None:
        """Tokens of an image, shape (N, D), some of them not a number; which are planted, shape (N,)."""
        cosines, seen = functional.cosine_similarity(tokens, before, dim=-1), tokens[:, 0].isfinite()
        for kept, chosen in zip(self._cosines.setdefault(name, ([], [])), (planted, ~planted), strict=True):
            kept.append(cosines[chosen & seen])

    def rows(self) -> dict[str, dict[str, float]]:
        """The means."""
        return {
            name: {
                "planted": round(float(torch.cat(planted).mean()), 4),
                "others": round(float(torch.cat(rest).mean()), 4),
            }
            for name, (planted, rest) in self._cosines.items()
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", nargs="+", required=True, metavar="IMAGE", help="files, folders or globs")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="leave out the first N (default: 0)")
    parser.add_argument("--limit", type=int, default=12, metavar="N", help="look at N, evenly spread (default: 12)")
    parser.add_argument("--max-side", type=int, default=224, metavar="N", help="of the windows (default: 224)")
    parser.add_argument("--planted", type=Path, required=True, metavar="FILE")
    parser.add_argument("--trained", type=Path, nargs="*", default=[], metavar="FILE")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write, too")
    args = parser.parse_args(argv)
    before = load_backbone("imgfocus_vits14")
    before = replace(before, spec=replace(before.spec, interpolation=BACKBONES[ROW].interpolation))
    planted = load_backbone(ROW, weights=args.planted)
    trained = {path.parent.name + "/" + path.name: load_backbone(ROW, weights=path) for path in args.trained}
    layout = Layout.of(args.max_side, planted.spec.patch_size)
    paths = find_images(args.images)[args.skip :]
    found = measure(before, planted, trained, layout, paths[:: max(1, len(paths) // args.limit)][: args.limit])
    for name, row in found["cosine"].items():
        print(f"{name:40} planted {row['planted']:.3f}  others {row['others']:.3f}")
    for name, share in found["outliers"].items():
        print(f"{name:40} outliers {100 * share:.2f} %")
    if args.out:
        write_json(args.out, found)
    return 0


def measure(
    before: Backbone, planted: Backbone, trained: dict[str, Backbone], layout: Layout, paths: Sequence[Path]
) -> dict[str, Any]:
    """Cosines by name, and shares of outliers."""
    nearness = Nearness()
    shares: dict[str, list[float]] = {}
    teachers = {
        name: Teacher(backbone, layout, 1, "mean", 0)
        for name, backbone in {"before": before, "planted": planted, **trained}.items()
    }
    norm: Any = planted.model.norm
    for number, path in enumerate(tqdm(paths, unit="img")):
        pixels = square(read_image(path).pixels, layout.pixels, path.name)
        patches = torch.from_numpy(cut_patches(Picture(pixels, layout.pixels, layout.pixels), layout.patch).patches)
        windows = pixels_of(patches, [layout.middle], layout.shape, planted)
        looks = {name: teacher.look(windows, layout.shape)[0] for name, teacher in teachers.items()}
        for name, tokens in looks.items():
            shares.setdefault(name, []).append(float((tokens.norm(dim=1) > OUTLIER).float().mean()))
        outlier, reference = looks["planted"].norm(dim=1) > OUTLIER, norm(looks["before"])
        for name in ("planted", *trained):
            tokens = (planted if name == "planted" else trained[name]).model.norm(looks[name])  # type: ignore[operator]
            nearness.add(name, tokens, reference, outlier)
        counts = [count for count in VIEWS if count <= layout.shifts]
        views = draw_views(layout, counts[-1], np.random.default_rng(number))
        seen = {
            name: lay_back(
                teachers[name].look(pixels_of(patches, views, layout.shape, planted), layout.shape), views, layout
            )
            for name in ("planted", "before")
        }
        for count in counts:
            for name, aggregate in AGGREGATES.items():
                nearness.add(
                    f"{count} views, {name}",
                    norm(_middle(aggregate(seen["planted"][:count]), layout)),
                    reference,
                    outlier,
                )
        others = norm(_middle(AGGREGATES["median"](seen["planted"][1:10]), layout))
        nearness.add("10 views without the straight one, median", others, reference, outlier)
        unplanted = norm(_middle(AGGREGATES["median"](seen["before"][:10]), layout))
        nearness.add("10 views of the model before, median", unplanted, reference, outlier)
    mean = {name: round(float(np.mean(values)), 5) for name, values in shares.items()}
    return {"images": len(paths), "side": layout.window * layout.patch, "cosine": nearness.rows(), "outliers": mean}


def _middle(tokens: Tensor, layout: Layout) -> Tensor:
    return crop(tokens.view(layout.picture, layout.picture, -1), layout.middle, layout.shape).flatten(0, 1)


if __name__ == "__main__":
    sys.exit(main())
