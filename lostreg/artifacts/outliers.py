"""Outliers: patch tokens with a norm far above the rest, and the cut-off that tells them from it.

In large Vision Transformers the L2 norms of the patch tokens before the final LayerNorm are bimodal: most lie at a few
tens, about 2 % several times as high (Darcet et al., "Vision Transformers Need Registers", ICLR 2024, section 2.1).
Norms of any number of images are kept as a fine histogram, and a rule finds the cut-off in it.

The rule ``auto`` works on the logarithms of the norms, so that a factor on all norms changes nothing but the cut-off:

* The histogram is smoothed with a Gaussian, as wide as suits the spread of the lower half and the number of norms
  (Silverman 1986), which outliers hardly change. It is at least 3 %, so that equal norms have a density as well, and
  so narrow that two modes a factor of two apart cannot merge.
* A cut-off may lie in any valley of the density that is at most a quarter as high as the peaks on both sides, has at
  least 3 norms above it but no more than a quarter of all, and whose upper side's median is at least twice the lower's.
* Few tokens make valleys by chance. So we ask how many norms would get across the valley if the tail went on falling
  as fast as it does just below. Normal, lognormal, gamma, Student-t and Pareto distributions all fall at least as fast
  further up, since the density of their logarithm is log-concave. The improbability of as many as there are, in nats
  (the Chernoff bound of the binomial distribution), must be 10 or more: about one valley in 20,000 by chance.
* Of several such valleys the most improbable wins, then the one with the widest gap. The cut-off is the middle of the
  empty bins about the valley's bottom, or the bottom where that is not empty.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import gaussian_filter1d
from scipy.special import rel_entr

from lostreg.checks import real_number, shown
from lostreg.errors import OptionError

Kind = Literal["auto", "number", "sigma", "percentile"]

_STEP: Final = math.log(1.01)  # the width of a bin, on the scale of natural logarithms
_GRID: Final = np.exp(np.arange(math.log(1e-4), math.log(1e8) + _STEP, _STEP))
_WIDTHS: Final = (0.03, math.log(2) / 4)  # of the Gaussian: the least and the greatest standard deviation
_DEPTH: Final = 1 / 4  # of a valley: its density over that of the lower of the two peaks
_RATIO: Final = 2.0  # of the two sides' medians
_LEAST: Final = 3  # norms above a cut-off
_MOST: Final = 1 / 4  # of all norms above a cut-off
_TAIL: Final = 10  # the fall below a valley is measured from where this many times as many norms lie above
_EVIDENCE: Final = 10.0  # nats

_NUMBER: Final = r"[0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?"
_RULE: Final = re.compile(rf"(?P<number>{_NUMBER})|mean\+(?P<sigma>{_NUMBER})sigma|(?P<percentile>{_NUMBER})%")
_LIMITS: Final[dict[Kind, float]] = {"number": math.inf, "sigma": math.inf, "percentile": 100.0}


class NormTally:
    """A histogram of norms in bins of one per cent, with exact count, mean, deviation, smallest and largest.

    Bin ``i`` holds the norms with ``edges[i - 1] <= norm < edges[i]``, compared in float64. The first bin holds all
    below the first edge, zero too, and the last one all from the last edge on.

    Args:
        edge: an additional edge, such as a cut-off known in advance.

    Attributes:
        edges: ascending, 1 % apart from 1e-4 to 1e8, and ``edge``; shape (K,), float64.
        counts: norms in each bin, shape (K + 1,), int64.

    Raises:
        ValueError: if ``edge`` is not a finite number above 0.
    """

    def __init__(self, edge: float | None = None) -> None:
        if edge is not None and not (math.isfinite(edge) and edge > 0):
            raise ValueError(f"an edge must be a finite number above 0, not {edge!r}")
        self.edges: NDArray[np.float64] = np.union1d(_GRID, [] if edge is None else [edge])
        self.counts: NDArray[np.int64] = np.zeros(len(self.edges) + 1, dtype=np.int64)
        self._count = 0
        self._mean = 0.0
        self._squares = 0.0  # sum of squared distances from the mean
        self._smallest = math.inf
        self._largest = 0.0

    @property
    def count(self) -> int:
        """How many norms were added."""
        return self._count

    @property
    def mean(self) -> float:
        """The mean norm; 0 for none."""
        return self._mean

    @property
    def deviation(self) -> float:
        """The population's standard deviation; 0 for none."""
        return math.sqrt(self._squares / max(self._count, 1))

    @property
    def smallest(self) -> float:
        """The smallest norm; 0 for none."""
        return self._smallest if self._count else 0.0

    @property
    def largest(self) -> float:
        """The largest norm; 0 for none."""
        return self._largest

    def bins(self, norms: ArrayLike) -> NDArray[np.int64]:
        """The index of each norm's bin, for joint histograms with the same bins.

        Args:
            norms: any shape, finite, at least 0.

        Returns:
            The same shape, in [0, K].

        Raises:
            ValueError: if a norm is negative or not finite.
        """
        return np.searchsorted(self.edges, _checked(norms), side="right").astype(np.int64)

    def add(self, norms: ArrayLike) -> None:
        """Count norms.

        Args:
            norms: any shape, finite, at least 0.

        Raises:
            ValueError: if a norm is negative or not finite; none of them is counted then.
        """
        values = _checked(norms).ravel()
        if not values.size:
            return
        self.counts += np.bincount(self.bins(values), minlength=len(self.counts))
        # Means and squares of two samples are merged, not summed: nothing cancels.
        mean, total = float(values.mean()), self._count + values.size
        apart = mean - self._mean
        self._squares += float(np.square(values - mean).sum()) + apart**2 * self._count * (values.size / total)
        self._mean += apart * (values.size / total)
        self._count = total
        self._smallest = min(self._smallest, float(values.min()))
        self._largest = max(self._largest, float(values.max()))

    def quantile(self, share: float) -> float:
        """The smallest norm with at least a share of all at or below it, to within its bin; 0 for no norms.

        Args:
            share: in [0, 1].
        """
        if not self._count:
            return 0.0
        index = _bin_at(self.counts, share)
        low, high = np.clip(np.pad(self.edges, 1, constant_values=(0.0, math.inf))[index : index + 2], 0, self._largest)
        return math.sqrt(max(low, self._smallest) * high)

    def above(self, cutoff: float) -> int:
        """How many norms reach a cut-off (norm >= cut-off).

        Exact for an edge, and for a cut-off that all or none reach; else how many reach the next edge above it.
        """
        if cutoff <= self.smallest:
            return self._count
        return int(self.counts[np.searchsorted(self.edges, cutoff, side="left") + 1 :].sum())

    def snap(self, cutoff: float) -> float:
        """The nearest edge at or above a cut-off; infinity above the last edge."""
        return float(np.append(self.edges, math.inf)[np.searchsorted(self.edges, cutoff, side="left")])


@dataclass(frozen=True)
class CutoffRule:
    """How to find a cut-off; as text, what `parse_rule` takes.

    Attributes:
        kind: ``auto``; a ``number``; so many ``sigma`` above the mean; or a ``percentile``.
        value: the number in units of the norms, the standard deviations, or per cent; 0 for ``auto``.

    Raises:
        OptionError: if the kind is another, or the value not above 0, or a percentile not below 100.
    """

    kind: Kind
    value: float = 0.0

    def __post_init__(self) -> None:
        if self.kind == "auto":
            return
        if self.kind not in _LIMITS:
            raise OptionError(f"kind must be one of auto, {', '.join(_LIMITS)}, not {shown(self.kind)}")
        value = real_number(self.value, self.kind)
        if not 0 < value < _LIMITS[self.kind]:
            raise OptionError(f"{self.kind} must be above 0 and below {_LIMITS[self.kind]:g}, not {shown(value)}")
        object.__setattr__(self, "value", value)

    def __str__(self) -> str:
        number = str(float(self.value)).removesuffix(".0")
        return {"auto": "auto", "number": number, "sigma": f"mean+{number}sigma", "percentile": f"{number}%"}[self.kind]


@dataclass(frozen=True)
class Cutoff:
    """What a rule found.

    Attributes:
        rule: the rule that was asked for.
        value: outliers have this norm or a higher one; an edge of the tally. None if there are no outliers.
        reason: one sentence for people.
    """

    rule: CutoffRule
    value: float | None
    reason: str

    @property
    def found(self) -> bool:
        """Whether there are outliers."""
        return self.value is not None


def parse_rule(text: str) -> CutoffRule:
    """Read a rule: ``auto``, a number such as ``150``, ``mean+3sigma``, or a percentile such as ``99.5%``.

    Raises:
        OptionError: if the text is none of them, a number is not above 0, or a percentile not below 100.
    """
    if text == "auto":
        return CutoffRule("auto")
    match = _RULE.fullmatch(text)
    for kind, limit in _LIMITS.items():
        if match and match[kind] and 0 < float(match[kind]) < limit:
            return CutoffRule(kind, float(match[kind]))
    raise OptionError(
        "a cut-off must be 'auto', a number above 0 such as '150', 'mean+3sigma', "
        f"or a percentile between 0 and 100 such as '99.5%', not {text!r}"
    )


def find_cutoff(tally: NormTally, rule: CutoffRule) -> Cutoff:
    """Find the cut-off between outliers and the rest.

    Numbers and means plus deviations go up to the next edge of the tally, percentiles down to their bin's lower edge;
    ``auto`` is described at the top of this module. It takes the same time for any number of norms.

    Returns:
        The cut-off. Without a value if no norm reaches it or, for ``auto``, if the norms are not bimodal.
    """
    if not tally.count:
        return Cutoff(rule, None, "there are no norms")
    if rule.kind == "auto":
        return _find_valley(tally, rule)
    if rule.kind == "number":
        value, name = tally.snap(rule.value), f"{rule.value:.4g}"
    elif rule.kind == "sigma":
        exact = tally.mean + rule.value * tally.deviation
        value, name = tally.snap(exact), f"{exact:.4g}, {rule.value:g} standard deviations above the mean"
    else:
        index = _bin_at(tally.counts, rule.value / 100)
        value = float(tally.edges[max(index - 1, 0)])
        name = f"{value:.4g}, the percentile {rule.value:g}"
    reached = tally.above(value)
    if not reached:
        return Cutoff(rule, None, f"no norm reaches {name}: the largest is {tally.largest:.4g}")
    return Cutoff(rule, value, f"{_percent(reached / tally.count)} of norms reach {name}")


@dataclass(frozen=True)
class _Valley:
    """A valley of the density: the improbability in nats, empty bins about its bottom, and the first bin above it."""

    evidence: float
    empty: int
    cut: int


def _find_valley(tally: NormTally, rule: CutoffRule) -> Cutoff:
    counts = _on_grid(tally)
    valleys = [valley for valley in _valleys(counts) if valley.evidence >= _EVIDENCE]
    if not valleys:
        return Cutoff(rule, None, "not bimodal: no separate second mode at least twice as high as the first")
    best = max(valleys, key=lambda valley: (valley.evidence, valley.empty))
    low, high = _medians(counts, best.cut)
    share = counts[best.cut :].sum() / tally.count
    between = "nothing" if best.empty else "few"
    reason = f"bimodal: {_percent(share)} of norms lie about {high:.3g}, the rest about {low:.3g}, {between} between"
    return Cutoff(rule, float(_GRID[best.cut - 1]), reason)


def _valleys(counts: NDArray[np.int64]) -> Iterator[_Valley]:
    """All valleys that are deep enough and have neither too few norms above them, nor too many or too low ones."""
    density = gaussian_filter1d(counts.astype(np.float64), _bandwidth(counts) / _STEP, mode="constant", truncate=3.0)
    reach = np.append(counts[::-1].cumsum()[::-1], 0)  # norms in a bin or further up
    for bottom in _minima(density):
        level = _DEPTH * min(density[:bottom].max(), density[bottom:].max())
        first, cut = _empty_bins(counts, bottom)
        if density[bottom] > level or not _LEAST <= reach[cut] <= _MOST * reach[0]:
            continue
        low, high = _medians(counts, cut)
        if high < _RATIO * low:
            continue
        lower = np.flatnonzero(density[:bottom] > level)[-1]
        upper = bottom + np.flatnonzero(density[bottom:] > level)[0]
        # The Gaussian made the valley narrower than it is: back to the norms on both sides of it.
        start = int(np.flatnonzero(counts[: lower + 1])[-1]) + 1
        stop = int(upper + np.flatnonzero(counts[upper:])[0])
        yield _Valley(_evidence(reach, start, stop), 2 * (cut - first), cut)


def _bandwidth(counts: NDArray[np.int64]) -> float:
    """Standard deviation of the Gaussian, on the scale of natural logarithms."""
    spread = (_bin_at(counts, 0.5) - _bin_at(counts, 0.25)) * _STEP / 0.6745
    return float(np.clip(0.9 * spread * counts.sum() ** -0.2, *_WIDTHS))


def _minima(density: NDArray[np.float64]) -> NDArray[np.int64]:
    """Where the density falls and then rises; the middle of a level bottom."""
    steps = np.diff(density)
    moves = np.flatnonzero(steps)
    turns = np.flatnonzero((steps[moves[:-1]] < 0) & (steps[moves[1:]] > 0))
    return (moves[turns] + 1 + moves[turns + 1]) // 2


def _empty_bins(counts: NDArray[np.int64], bottom: int) -> tuple[int, int]:
    """The first of the empty bins about a valley's bottom, and their middle; twice the bottom if it is not empty."""
    if counts[bottom]:
        return bottom, bottom
    taken = np.flatnonzero(counts)
    after = int(np.searchsorted(taken, bottom))
    first, last = int(taken[after - 1]) + 1, int(taken[after]) - 1
    return first, (first + last + 1) // 2


def _evidence(reach: NDArray[np.int64], start: int, stop: int) -> float:
    """How improbable it is that so many norms get across a valley, in nats, if the tail falls as just below it.

    Args:
        reach: norms in each bin or further up.
        start: the valley's first bin.
        stop: the first bin above the valley.
    """
    entering, passing = float(reach[start]), float(reach[stop])
    origin = int(np.flatnonzero(reach >= min(_TAIL * entering, reach[0] / 2))[-1])
    if origin >= start:
        return 0.0
    rate = math.log(reach[origin] / entering) / (start - origin)
    expected, share = max(math.exp(-rate * (stop - start)), 1e-300), passing / entering
    if share <= expected:
        return 0.0
    return entering * float(rel_entr(share, expected) + rel_entr(1 - share, 1 - expected))


def _on_grid(tally: NormTally) -> NDArray[np.int64]:
    """The counts of a tally without its additional edge, in bins of the same width."""
    index = np.append(0, np.searchsorted(_GRID, tally.edges, side="right"))
    return np.bincount(index, weights=tally.counts, minlength=len(_GRID) + 1).astype(np.int64)


def _medians(counts: NDArray[np.int64], cut: int) -> tuple[float, float]:
    """The median norms below a bin, and in it or above, to within a bin."""
    edges = np.append(_GRID, _GRID[-1] * math.exp(_STEP)) * math.exp(-_STEP / 2)
    return float(edges[_bin_at(counts[:cut], 0.5)]), float(edges[cut + _bin_at(counts[cut:], 0.5)])


def _bin_at(counts: NDArray[np.int64], share: float) -> int:
    """The first bin with at least a share of all norms in it or below."""
    below = counts.cumsum()
    return int(np.searchsorted(below, max(share * below[-1], 1)))


def _checked(norms: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(norms, dtype=np.float64)
    if not (np.isfinite(values) & (values >= 0)).all():
        raise ValueError("norms must be finite and at least 0")
    return values


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"
