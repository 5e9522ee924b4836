"""The report folder: one self-contained HTML page, its pictures as PNG files, and a JSON with every number."""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure

from lostreg.artifacts import figures
from lostreg.artifacts.measurement import CELLS, Measurement
from lostreg.artifacts.outliers import NormTally
from lostreg.artifacts.probes import ClassProbe, PixelProbe, PositionProbe, Skipped, Spread
from lostreg.artifacts.sample import RASTER
from lostreg.errors import LostregError
from lostreg.jsonio import write_json
from lostreg.templates import render

FORMAT: Final = "lostreg artifacts 1"
PAGE: Final = "artifacts.html"
NUMBERS: Final = "artifacts.json"
_QUANTILES: Final = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
_DPI: Final = 130


@dataclass(frozen=True)
class _Picture:
    """A figure of the report."""

    name: str
    figure: Figure
    caption: str
    heading: str = ""


def write_report(out: Path, found: Sequence[Measurement], settings: dict[str, Any]) -> list[Path]:
    """Write the report on one or several backbones.

    Args:
        out: the folder; made if need be. Files of an earlier report in it are replaced.
        found: what was measured, at least one.
        settings: how: recorded, and shown at the end of the page.

    Returns:
        The files: page, numbers, pictures.

    Raises:
        LostregError: if the folder cannot be written.

    Example:
        >>> found = lostreg.artifacts.measure(["dog.jpg"], lostreg.Discoverer("dinov2_vits14_reg", device="cpu"))
        >>> lostreg.artifacts.write_report(Path("report"), [found], {"seed": 0})[0].as_posix()
        'report/artifacts.html'
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / NUMBERS, {"format": FORMAT, **settings, "backbones": [as_numbers(one) for one in found]})
        pages = list(_pictures(found))
        encoded = [(picture, _png(picture.figure)) for picture in pages]
        for stale in out.glob("examples-*.png"):
            stale.unlink()
        for picture, data in encoded:
            (out / f"{picture.name}.png").write_bytes(data)
        (out / PAGE).write_text(_page(found, encoded, settings), encoding="utf-8")
    except OSError as error:
        raise LostregError(f"cannot write the report to {out}: {error.strerror}") from error
    return [out / PAGE, out / NUMBERS, *(out / f"{picture.name}.png" for picture in pages)]


def as_numbers(measured: Measurement) -> dict[str, Any]:
    """Every number of one backbone as plain values, for JSON.

    Example:
        >>> found = lostreg.artifacts.measure(["dog.jpg"], lostreg.Discoverer("dinov2_vits14_reg", device="cpu"))
        >>> lostreg.artifacts.as_numbers(found)["outliers"]
        0
    """
    seen, sample = measured.seen, measured.sample
    outlier_cosine, normal_cosine = measured.cosine_means()
    first = np.inf if measured.cutoff.value is None else measured.cutoff.value
    outlier_heat, normal_heat = seen.split(seen.heat, first)
    outlier_cosines, normal_cosines = measured.cosine_histograms()
    return {
        "backbone": measured.backbone,
        "weights": measured.weights,
        "test_time_registers": measured.registers,
        "images": seen.images,
        "unreadable": len(seen.errors),
        "patches": measured.patches,
        "cutoff": {"rule": str(measured.cutoff.rule), "norm": measured.cutoff.value, "reason": measured.cutoff.reason},
        "outliers": measured.outliers,
        "outlier_share": measured.outliers / measured.patches,
        "outliers_emerge_in_layer": measured.emerges,
        "norms": {
            "by_layer_before_final_norm": [_tally(tally, measured.cutoff.value) for tally in seen.layers],
            "output_after_final_norm": _tally(seen.final, None),
            "prefix_tokens_by_layer": dict(zip(measured.prefix_names, seen.prefix.T.tolist(), strict=True)),
        },
        "places": {"cells": CELLS, "outliers": outlier_heat.round(6).tolist(), "normal": normal_heat.round(6).tolist()},
        "neighbour_cosine": {
            "mean_of_outliers": outlier_cosine,
            "mean_of_normal": normal_cosine,
            "outliers": outlier_cosines.tolist(),
            "normal": normal_cosines.tolist(),
        },
        "sample": {
            "images": sample.images,
            "images_with_outliers": sample.affected,
            "outliers": sample.outliers,
            "position": {"cells": RASTER, **{kind: asdict(one) for kind, one in sample.position.items()}},
            "pixels": {kind: asdict(one) for kind, one in sample.pixels.items()},
            "classes": asdict(sample.classes)
            if isinstance(sample.classes, Skipped)
            else {kind: asdict(one) for kind, one in sample.classes.items()},
            "gram": {
                "feature": measured.feature,
                "layer": measured.layer,
                "all_patches": asdict(sample.gram),
                "without_outliers": asdict(sample.gram_normal) if sample.gram_normal else None,
            },
        },
    }


def _tally(tally: NormTally, cutoff: float | None) -> dict[str, Any]:
    used = np.flatnonzero(tally.counts)
    lower = np.append(0.0, tally.edges)
    return {
        "mean": tally.mean,
        "deviation": tally.deviation,
        "smallest": tally.smallest,
        "largest": tally.largest,
        "quantiles": {str(share): tally.quantile(share) for share in _QUANTILES},
        "share_above_cutoff": None if cutoff is None else tally.above(cutoff) / tally.count,
        "histogram": {"from": [float(f"{edge:.6g}") for edge in lower[used]], "counts": tally.counts[used].tolist()},
    }


def _pictures(found: Sequence[Measurement]) -> Iterator[_Picture]:
    yield _Picture(
        "norms",
        figures.norm_histograms(found),
        "L2 norms of all patch tokens at the output. Outliers show before the model's final LayerNorm only: it gives "
        "all tokens about the same length, which is why norms taken from a model's usual output show none. Models "
        "without a final norm have one histogram twice.",
        heading="Norms",
    )
    yield _Picture(
        "layers",
        figures.norms_by_layer(found),
        "The same norms as they leave each block, before any final norm; dashed lines: means of the tokens in front "
        "of the patches. Outliers emerge in the first layer that has at least half as many as the output.",
    )
    yield _Picture(
        "places",
        figures.outlier_places(found),
        f"Share of patches that are outliers, in {CELLS} x {CELLS} cells over the image; where there are none, the "
        "norm instead.",
        heading="Where outliers sit",
    )
    yield _Picture(
        "neighbours",
        figures.neighbour_similarities(found),
        "How similar patches are to those above, below, left and right of them right after the patch embedding, "
        "before positions are added. In the register paper's models outliers are more similar to their neighbours "
        "than other patches.",
    )
    yield _Picture(
        "probes",
        figures.probe_bars(found),
        "Linear models on tokens after the final norm, trained on 70 % of the sample's images and measured on the "
        "rest; means and deviations over five splits. Compare outliers with as many normal tokens of the same images: "
        "more tokens make better probes. The table below has the figures of a guess, and counts.",
        heading="What tokens hold",
    )
    yield _Picture(
        "gram",
        figures.gram_spectra(found),
        "Shares of the largest eigenvalues of the Gram matrix that LOST works on, of all patches and of those that "
        "are no outliers, with the share of pairs of patches whose similarity is positive. Means over the images of "
        "the sample that have outliers, over all where none has any; with test-time registers over the same images "
        "as without.",
        heading="How LOST sees the patches",
    )
    for number, measured in enumerate(found, start=1):
        if measured.sample.examples:
            yield _Picture(
                f"examples-{number}",
                figures.example_maps(measured),
                f"{measured.title}: images of the sample with the most outliers, or the first ones where there are "
                f"none. Degrees are of {measured.feature} of layer {measured.layer}: to how many others a patch is "
                "similar.",
                heading="Images" if number == 1 else "",
            )


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=_DPI, format="png")
    return buffer.getvalue()


def _page(found: Sequence[Measurement], pictures: Sequence[tuple[_Picture, bytes]], settings: dict[str, Any]) -> str:
    return render(
        "lostreg.artifacts",
        "report.html",
        pictures=[(picture, base64.b64encode(data).decode("ascii")) for picture, data in pictures],
        summary=_summary(found),
        probes=_probes(found),
        settings=settings,
    )


def _summary(found: Sequence[Measurement]) -> list[list[str]]:
    rows = []
    for one in found:
        value, count = one.cutoff.value, one.outliers
        rows.append(
            [
                one.title,
                f"{one.seen.images:,}" + (f" ({len(one.seen.errors)} unreadable)" if one.seen.errors else ""),
                f"{one.patches:,}",
                "none found" if value is None else f"{count:,} ({100 * count / one.patches:.2f} %)",
                "-" if value is None else f"{value:.4g}",
                "-" if one.emerges is None else str(one.emerges),
                f"{one.cutoff.rule}: {one.cutoff.reason}",
            ]
        )
    return rows


def _probes(found: Sequence[Measurement]) -> list[list[str]]:
    rows = []
    for one in found:
        for kind, position in one.sample.position.items():
            rows.append([one.title, f"position, {kind} tokens", *_position_row(position)])
        for kind, pixels in one.sample.pixels.items():
            rows.append([one.title, f"pixels, {kind} tokens", *_pixel_row(pixels)])
        if isinstance(one.sample.classes, Skipped):
            rows.append([one.title, "class", f"not measured: {one.sample.classes.reason}", "", ""])
        else:
            for kind, probe in one.sample.classes.items():
                rows.append([one.title, f"class, {kind}", *_class_row(probe)])
    return rows


def _position_row(probe: PositionProbe | Skipped) -> list[str]:
    if isinstance(probe, Skipped):
        return [f"not measured: {probe.reason}", "", ""]
    result = f"top-1 {_text(probe.accuracy)} %, {_text(probe.distance)} cells off (of {RASTER} x {RASTER})"
    return [result, f"{_text(probe.chance)} %", f"{probe.tokens:,} tokens of {probe.images} images"]


def _pixel_row(probe: PixelProbe | Skipped) -> list[str]:
    if isinstance(probe, Skipped):
        return [f"not measured: {probe.reason}", "", ""]
    return [
        f"L2 error {_text(probe.error)}",
        _text(probe.baseline),
        f"{probe.tokens:,} tokens of {probe.images} images",
    ]


def _class_row(probe: ClassProbe | Skipped) -> list[str]:
    if isinstance(probe, Skipped):
        return [f"not measured: {probe.reason}", "", ""]
    return [
        f"{_text(probe.accuracy)} %",
        f"{_text(probe.chance)} %",
        f"{probe.images} images of {probe.classes} classes",
    ]


def _text(spread: Spread) -> str:
    return f"{spread.mean:.2f} ± {spread.deviation:.2f}"
