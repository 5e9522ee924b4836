"""What registers change, by their number: the register paper's figure 8, for registers of any origin."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lostreg.artifacts.measurement import Measurement
from lostreg.artifacts.probes import ClassProbe, PixelProbe, PositionProbe, Spread
from lostreg.metrics import Corloc

TRAINED: Final = "trained here"
TEST_TIME: Final = "test-time"
AS_GIVEN: Final = "as given"
_LOOKS: Final = {  # colour, marker and line, and how far beside the number
    TRAINED: ("#3b6ea5", "o-", -0.07),
    TEST_TIME: ("#c8442e", "s--", 0.07),
    AS_GIVEN: ("#555555", "D", 0.0),
}
_TOKENS: Final = "normal"  # the kind of tokens that probes are compared on: every variant has them
_TAIL: Final = 0.999  # quantile of the norms that is drawn
_COLUMNS: Final = 3


@dataclass(frozen=True)
class Variant:
    """A backbone with so many registers.

    Attributes:
        origin: where they come from: `TRAINED`, `TEST_TIME` or `AS_GIVEN`.
        registers: how many, of any kind.
        measured: its norms, outliers and probes.
        score: of LOST on a benchmark; None where none was asked for.
    """

    origin: str
    registers: int
    measured: Measurement
    score: Corloc | None = None

    @property
    def title(self) -> str:
        """For people."""
        if self.origin == AS_GIVEN:
            return f"{self.measured.backbone}, {self.origin}"
        return f"{self.registers} register{'s' * (self.registers != 1)}, {self.origin}"

    @property
    def outliers(self) -> float:
        """Share of patches that are outliers, in percent."""
        return 100 * self.measured.outliers / self.measured.patches

    def numbers(self) -> dict[str, Any]:
        """What the figure shows, as plain values for JSON; None for what was not measured."""
        norms, score = self.measured.seen.layers[-1], self.score
        return {
            "title": self.title,
            "origin": self.origin,
            "registers": self.registers,
            "outliers_percent": self.outliers,
            "norm_median": norms.quantile(0.5),
            f"norm_quantile_{_TAIL}": norms.quantile(_TAIL),
            "corloc": None if score is None else {"percent": score.percent, "interval_95": score.wilson_interval()},
            **{name: (spread := read(self.measured)) and asdict(spread) for name, (_, read) in _PROBES.items()},
        }


def _position(measured: Measurement) -> Spread | None:
    probe = measured.sample.position.get(_TOKENS)
    return probe.accuracy if isinstance(probe, PositionProbe) else None


def _pixels(measured: Measurement) -> Spread | None:
    probe = measured.sample.pixels.get(_TOKENS)
    return probe.error if isinstance(probe, PixelProbe) else None


def _classes(measured: Measurement) -> Spread | None:
    classes = measured.sample.classes
    probe = classes.get("CLS") if isinstance(classes, dict) else None
    return probe.accuracy if isinstance(probe, ClassProbe) else None


_PROBES: Final[dict[str, tuple[str, Callable[[Measurement], Spread | None]]]] = {
    "position": ("position of a patch: top-1 accuracy (%)", _position),
    "pixels": ("pixels of a patch: L2 error", _pixels),
    "class": ("class of an image, from CLS: accuracy (%)", _classes),
}

Place = tuple[Variant, float, float, float]  # a variant, its figure, and the ends of the figure's spread


def registers_figure(variants: Sequence[Variant]) -> Figure:
    """Outliers, norms, probes and corloc by the number of registers, a line an origin.

    Args:
        variants: at least one, of each origin in the order of their numbers.
    """
    panels = {
        "patches that are outliers (%)": [(one, one.outliers, one.outliers, one.outliers) for one in variants],
        f"norm of patches: median to {100 * _TAIL:g} %": [_norms(one) for one in variants],
    }
    for title, read in _PROBES.values():
        panels[title] = [
            (one, spread.mean, spread.mean - spread.deviation, spread.mean + spread.deviation)
            for one in variants
            if (spread := read(one.measured)) is not None
        ]
    scored = [(one, one.score) for one in variants if one.score is not None]
    panels["corloc (%), 95 % interval"] = [(one, score.percent, *score.wilson_interval()) for one, score in scored]
    panels = {title: places for title, places in panels.items() if places}
    rows = -(-len(panels) // _COLUMNS)
    figure = Figure(figsize=(4.2 * min(_COLUMNS, len(panels)), 3.4 * rows), layout="constrained")
    axes = list(figure.subplots(rows, min(_COLUMNS, len(panels)), squeeze=False).flat)
    numbers = sorted({one.registers for one in variants})
    for panel, (title, places) in zip(axes, panels.items(), strict=False):
        _draw(panel, places, numbers)
        panel.set_title(title, fontsize=10)
    for panel in axes[len(panels) :]:
        panel.set_visible(False)
    axes[0].legend(fontsize=8)
    return figure


def _norms(one: Variant) -> Place:
    norms = one.measured.seen.layers[-1]
    median = norms.quantile(0.5)
    return one, median, median, norms.quantile(_TAIL)


def _draw(panel: Axes, places: Sequence[Place], numbers: Sequence[int]) -> None:
    """A line an origin; numbers of registers stand at equal distances."""
    for origin, (colour, style, beside) in _LOOKS.items():
        of_origin = [place for place in places if place[0].origin == origin]
        if of_origin:
            across = [numbers.index(one.registers) + beside for one, *_ in of_origin]
            middles = [middle for _, middle, *_ in of_origin]
            spread = [
                [middle - low for _, middle, low, _ in of_origin],
                [high - middle for _, middle, _, high in of_origin],
            ]
            panel.errorbar(across, middles, spread, color=colour, fmt=style, markersize=5, capsize=3, label=origin)
            for x, (one, y, *_) in zip(across, of_origin, strict=True) if origin == AS_GIVEN else ():
                panel.annotate(one.measured.backbone, (x, y), (5, 4), textcoords="offset points", fontsize=6)
    panel.set_xticks(range(len(numbers)), [str(number) for number in numbers])
    panel.set_xlim(-0.4, len(numbers) - 0.6)
    panel.set_xlabel("registers")
    panel.margins(y=0.1)
