"""The report folder: one self-contained HTML page, its pictures as PNG, SVG and PDF, and a JSON with every number."""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from lostreg.artifacts import figures
from lostreg.artifacts.ablation import Variant, registers_figure
from lostreg.artifacts.measurement import CELLS, Measurement
from lostreg.artifacts.outliers import NormTally
from lostreg.artifacts.probes import ClassProbe, PixelProbe, PositionProbe, Skipped, Spread
from lostreg.artifacts.sample import RASTER
from lostreg.errors import LostregError
from lostreg.jsonio import write_json, write_whole
from lostreg.templates import TEMPLATES

FORMAT: Final = "lostreg artifacts 1"
PAGE: Final = "artifacts.html"
NUMBERS: Final = "artifacts.json"
FIGURE: Final = "registers.pdf"  # of an ablation
_QUANTILES: Final = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
_DPI: Final = 130
_FORMATS: Final[dict[str, dict[str, None]]] = {  # of pictures, and what of their metadata would tell the time
    "png": {},
    "svg": {"Date": None},
    "pdf": {"CreationDate": None},
}

# The pictures of all backbones side by side, by the names of their files; report.html says what they show.
_FIGURES: Final[dict[str, Callable[[Sequence[Measurement]], Figure]]] = {
    "norms": figures.norm_histograms,
    "layers": figures.norms_by_layer,
    "places": figures.outlier_places,
    "neighbours": figures.neighbour_similarities,
    "probes": figures.probe_bars,
    "gram": figures.gram_spectra,
}


_PLOTS: Final = ("norms", "layers", "neighbours", "probes", "gram", "registers")  # of lines and bars: no photographs


def write_report(
    out: str | Path,
    found: Sequence[Measurement],
    settings: dict[str, Any],
    *,
    variants: Sequence[Variant] = (),
    attention: Sequence[Figure] = (),
) -> list[Path]:
    """Write the report on one or several backbones.

    Args:
        out: the folder; made if need be. Files of an earlier report in it are replaced.
        found: what was measured, at least one.
        settings: how: recorded, and shown at the end of the page.
        variants: of an ablation of registers, whose figure comes first.
        attention: pictures of attention maps, which come after it.

    Returns:
        The files: page, numbers, pictures, each of these as PNG, SVG and PDF.

    Raises:
        LostregError: if the folder cannot be written.

    Example:
        >>> found = lostreg.artifacts.measure(["dog.jpg"], lostreg.Discoverer("dinov2_vits14_reg", device="cpu"))
        >>> lostreg.artifacts.write_report(Path("report"), [found], {"seed": 0})[0].as_posix()
        'report/artifacts.html'
    """
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        ablation = {"registers": [one.numbers() for one in variants]} if variants else {}
        numbers = {"format": FORMAT, **settings, **ablation, "backbones": [as_numbers(one) for one in found]}
        write_json(out / NUMBERS, numbers)
        drawn = dict(_pictures(found))
        drawn |= {f"attention-{number}": figure for number, figure in enumerate(attention, start=1)}
        if variants:
            drawn["registers"] = registers_figure(variants)
        pictures = {name: _encoded(figure) for name, figure in drawn.items()}
        for kind in _FORMATS:
            for stale in (*out.glob(f"examples-*.{kind}"), *out.glob(f"attention-*.{kind}")):
                stale.unlink()
        files = {out / f"{name}.{kind}": data for name, one in pictures.items() for kind, data in one.items()}
        for path, data in files.items():
            path.write_bytes(data)
        page = TEMPLATES.get_template("artifacts/report.html").render(
            summary=_summary(found),
            probes=_probes(found),
            measurements=found,
            pictures={name: one["png"] for name, one in pictures.items()},
            inches={name: figure.get_figwidth() for name, figure in drawn.items()},
            outcome="; ".join(map(_outcome, found)),
            cells=CELLS,
            settings=settings,
            shown_attention=len(attention),
            plots=_PLOTS,
        )
        write_whole(out / PAGE, page, errors="backslashreplace")
    except OSError as error:
        raise LostregError(f"cannot write the report to {out}: {error.strerror}") from error
    return [out / PAGE, out / NUMBERS, *files]


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


def _pictures(found: Sequence[Measurement]) -> Iterator[tuple[str, Figure]]:
    for name, draw in _FIGURES.items():
        yield name, draw(found)
    for number, measured in enumerate(found, start=1):
        if measured.sample.examples:
            yield f"examples-{number}", figures.example_maps(measured)


def _encoded(figure: Figure) -> dict[str, bytes]:
    """A picture in each of `_FORMATS`, laid out once; the same picture gives the same bytes."""
    encoded = {}
    with rc_context({"svg.hashsalt": "lostreg"}):
        for kind, metadata in _FORMATS.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, dpi=_DPI, format=kind, metadata=metadata)
            figure.set_layout_engine("none")
            encoded[kind] = buffer.getvalue()
    return encoded


def _outcome(one: Measurement) -> str:
    """What was found of one backbone, for those who see no pictures."""
    if one.cutoff.value is None:
        return f"{one.title}: no outliers found"
    share = 100 * one.outliers / one.patches
    return f"{one.title}: {share:.2f} % of the patches have norms of {one.cutoff.value:.4g} and more"


def _summary(found: Sequence[Measurement]) -> Iterator[tuple[str, ...]]:
    for one in found:
        value, count = one.cutoff.value, one.outliers
        rule = f"{one.cutoff.rule.value:.4g}" if one.cutoff.rule.kind == "number" else one.cutoff.rule
        yield (
            one.title,
            f"{one.seen.images:,}" + (f" ({len(one.seen.errors)} unreadable)" if one.seen.errors else ""),
            f"{one.patches:,}",
            "none found" if value is None else f"{count:,} ({100 * count / one.patches:.2f} %)",
            "-" if value is None else f"{value:.4g}",
            "-" if one.emerges is None else str(one.emerges),
            f"{rule}: {one.cutoff.reason}",
        )


def _probes(found: Sequence[Measurement]) -> Iterator[tuple[str, ...]]:
    for one in found:
        sample = one.sample
        for kind, position in sample.position.items():
            yield one.title, f"position: {kind}", *_probe_row(position)
        for kind, pixels in sample.pixels.items():
            yield one.title, f"pixels: {kind}", *_probe_row(pixels)
        if isinstance(sample.classes, Skipped):
            yield one.title, "class", *_probe_row(sample.classes)
        else:
            for kind, classes in sample.classes.items():
                yield one.title, f"class: {kind}", *_probe_row(classes)


def _probe_row(probe: PositionProbe | PixelProbe | ClassProbe | Skipped) -> tuple[str, str, str]:
    """The result, that of a guess, and what both were measured on."""
    if isinstance(probe, Skipped):
        return f"not measured: {probe.reason}", "", ""
    if isinstance(probe, ClassProbe):
        used = f"{probe.images} images of {probe.classes} classes"
        return f"{_text(probe.accuracy)} %", f"{_text(probe.chance)} %", used
    used = f"{probe.tokens:,} tokens of {probe.images} images"
    if isinstance(probe, PixelProbe):
        return f"L2 error {_text(probe.error)}", _text(probe.baseline), used
    result = f"top-1 {_text(probe.accuracy)} %, {_text(probe.distance)} cells off (of {RASTER} x {RASTER})"
    return result, f"{_text(probe.chance)} %", used


def _text(spread: Spread) -> str:
    return f"{spread.mean:.2f} ± {spread.deviation:.2f}"
