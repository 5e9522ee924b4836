"""Cut-offs: the tally against numpy, the rules as text and by hand, and which distributions are bimodal."""

import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.random import Generator, default_rng

from lostreg.artifacts.outliers import Cutoff, CutoffRule, NormTally, find_cutoff, parse_rule
from lostreg.errors import OptionError

BIN = 1.01
AUTO = CutoffRule("auto")

norm_arrays = arrays(np.float64, st.integers(1, 60), elements=st.floats(0, 1e6) | st.sampled_from([1.0, 47.0, 150.0]))


def tally_of(norms: np.ndarray, edge: float | None = None) -> NormTally:
    tally = NormTally(edge)
    tally.add(norms)
    return tally


def auto(norms: np.ndarray) -> Cutoff:
    return find_cutoff(tally_of(norms), AUTO)


def lognormal(rng: Generator, size: int, centre: float, spread: float) -> np.ndarray:
    return centre * np.exp(spread * rng.standard_normal(size))


def mixture(
    rng: Generator, size: int, share: float, low: tuple[float, float], high: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Two groups of lognormal norms, each with its centre and spread; at least 3 are high."""
    many = max(round(share * size), 3)
    return lognormal(rng, size - many, *low), lognormal(rng, many, *high)


@given(norm_arrays)
@settings(deadline=None, max_examples=60)
def test_moments_and_extremes_are_those_of_the_norms(norms: np.ndarray) -> None:
    tally = tally_of(norms)
    assert tally.count == len(norms) == tally.counts.sum()
    assert tally.mean == pytest.approx(norms.mean(), rel=1e-12)
    assert tally.deviation == pytest.approx(norms.std(), rel=1e-9, abs=1e-9)
    assert (tally.smallest, tally.largest) == (norms.min(), norms.max())


@given(norm_arrays, st.integers(0, 60), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_neither_order_nor_batches_matter(norms: np.ndarray, middle: int, random: object) -> None:
    whole, parts = tally_of(norms, 150.0), NormTally(150.0)
    shuffled = np.array(sorted(norms, key=lambda _: random.random()))  # type: ignore[attr-defined]
    for part in (shuffled[middle:], shuffled[:middle]):
        parts.add(part)
    assert np.array_equal(whole.counts, parts.counts)
    assert parts.count == whole.count
    assert parts.mean == pytest.approx(whole.mean, rel=1e-12)
    assert parts.deviation == pytest.approx(whole.deviation, rel=1e-9, abs=1e-9)
    assert (parts.smallest, parts.largest) == (whole.smallest, whole.largest)
    for rule in (AUTO, CutoffRule("number", 150.0), CutoffRule("percentile", 90.0)):
        assert find_cutoff(parts, rule) == find_cutoff(whole, rule)


def test_a_small_deviation_about_a_large_mean_is_not_lost() -> None:
    tally = NormTally()
    for part in np.split(1e7 + np.tile([0.0, 1e-2], 500), 10):
        tally.add(part)
    assert tally.deviation == pytest.approx(5e-3, rel=1e-6)


def test_a_tally_of_nothing_is_all_zeros() -> None:
    tally = tally_of(np.zeros((0, 3)))
    assert (tally.count, tally.mean, tally.deviation, tally.smallest, tally.largest) == (0, 0.0, 0.0, 0.0, 0.0)
    assert tally.quantile(0.5) == 0
    assert tally.above(1.0) == 0


@pytest.mark.parametrize("bad", [-1e-9, np.nan, np.inf])
def test_norms_that_are_negative_or_not_finite_are_refused_whole(bad: float) -> None:
    tally = NormTally()
    for method in (tally.add, tally.bins):
        with pytest.raises(ValueError, match="norms must be finite and at least 0"):
            method(np.array([[1.0, bad]]))
    assert tally.count == tally.counts.sum() == 0


@pytest.mark.parametrize("edge", [0.0, -1.0, np.nan, np.inf])
def test_an_edge_is_a_finite_number_above_zero(edge: float) -> None:
    with pytest.raises(ValueError, match="an edge must be a finite number above 0, not"):
        NormTally(edge)


def test_edges_are_one_per_cent_apart_and_cover_twelve_decades() -> None:
    edges = NormTally().edges
    np.testing.assert_allclose(edges[1:] / edges[:-1], BIN, rtol=1e-9)
    assert edges[0] == pytest.approx(1e-4)
    assert edges[-1] >= 1e8 * (1 - 1e-9)
    extended = NormTally(150.0)
    assert np.array_equal(extended.edges, np.sort(np.append(edges, 150.0)))
    assert len(extended.counts) == len(extended.edges) + 1
    assert np.array_equal(NormTally(float(edges[7])).edges, edges)


def test_a_bin_holds_its_lower_edge_and_not_its_upper_one() -> None:
    tally = NormTally(150.0)
    edges, index = tally.edges, int(np.flatnonzero(tally.edges == 150.0)[0])
    norms = np.array([[0.0, 1e-5, edges[0]], [np.nextafter(150.0, 0), 150.0, 1e12]])
    expected = [[0, 0, 1], [index, index + 1, len(edges)]]
    assert tally.bins(norms).tolist() == expected
    tally.add(norms)
    assert np.array_equal(tally.counts, np.bincount(np.ravel(expected), minlength=len(edges) + 1))


@given(norm_arrays, st.sampled_from([1.0, 47.0, 150.0]))
@settings(deadline=None, max_examples=60)
def test_norms_above_an_edge_are_counted_exactly(norms: np.ndarray, edge: float) -> None:
    tally = tally_of(np.append(norms, [np.nextafter(edge, 0), edge]), edge)
    assert tally.snap(edge) == edge
    assert tally.above(edge) == (norms >= edge).sum() + 1
    for index in (0, 700, 1400, 2000, -1):
        cutoff = tally.edges[index]
        assert tally.above(cutoff) == (norms >= cutoff).sum() + (edge >= cutoff) + (np.nextafter(edge, 0) >= cutoff)
    assert tally.above(0.0) == tally.count


@given(st.floats(1e-4, 9e7))
@settings(deadline=None, max_examples=60)
def test_a_cutoff_snaps_to_the_next_edge_above_it(cutoff: float) -> None:
    tally = NormTally()
    snapped = tally.snap(cutoff)
    assert snapped in tally.edges
    assert cutoff <= snapped <= cutoff * BIN * (1 + 1e-9)
    assert tally.snap(snapped) == snapped
    tally.add([0.0, snapped, 1e9])
    assert tally.above(cutoff) == tally.above(snapped) == 2


def test_nothing_is_above_the_last_edge() -> None:
    tally = tally_of(np.array([1.0, 1e12]))
    assert tally.snap(1e9) == np.inf
    assert tally.above(1e9) == 0


@given(norm_arrays, st.floats(0, 1))
@settings(deadline=None, max_examples=100)
def test_quantiles_are_right_to_within_a_bin(norms: np.ndarray, share: float) -> None:
    norms = np.where(norms < 1e-3, 0, norms)
    found = tally_of(norms).quantile(share)
    ordered = np.sort(norms)
    exact = ordered[int(np.searchsorted(np.arange(1, len(norms) + 1), share * len(norms)))]
    assert norms.min() <= found <= norms.max()
    assert exact / BIN <= found <= max(exact * BIN, 1e-4)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("auto", AUTO),
        ("150", CutoffRule("number", 150.0)),
        ("0.125", CutoffRule("number", 0.125)),
        ("mean+3sigma", CutoffRule("sigma", 3.0)),
        ("mean+2.5sigma", CutoffRule("sigma", 2.5)),
        ("99.5%", CutoffRule("percentile", 99.5)),
        ("1e+20", CutoffRule("number", 1e20)),
    ],
)
def test_a_rule_is_read_and_written(text: str, rule: CutoffRule) -> None:
    assert parse_rule(text) == rule
    assert str(rule) == text


@given(st.floats(0, exclude_min=True, allow_infinity=False), st.sampled_from(["number", "sigma", "percentile"]))
def test_any_rule_is_read_as_it_is_written(value: float, kind: str) -> None:
    rule = CutoffRule(kind, value % 100 or 1.0 if kind == "percentile" else value)  # type: ignore[arg-type]
    assert parse_rule(str(rule)) == rule


NO_NUMBERS = ["", "Auto", "0", "-3", "nan", "inf", "1e999", "1_0", " 150", "150 ", "150\n", "1.", "1\u0663"]
NO_SUMS = ["mean+sigma", "mean+0sigma", "mean-3sigma", "mean+3", "3sigma", "mean+3%", "0%", "100%", "99.5 %", "%"]


@pytest.mark.parametrize("text", [*NO_NUMBERS, *NO_SUMS])
def test_anything_else_is_no_rule(text: str) -> None:
    with pytest.raises(OptionError, match=r"a cut-off must be 'auto', a number above 0 such as .* not ") as error:
        parse_rule(text)
    assert str(error.value).endswith(repr(text))


def test_a_number_is_the_cutoff_whatever_the_shape() -> None:
    tally = tally_of(np.append(np.full(98, 47.0), [150.0, 149.99]), 150.0)
    rule = CutoffRule("number", 150.0)
    assert find_cutoff(tally, rule) == Cutoff(rule, 150.0, "1 % of norms reach 150")
    assert tally.above(150.0) == 1
    without = find_cutoff(tally_of(np.full(4, 200.0)), rule).value
    assert without is not None
    assert 150 < without <= 150 * BIN


def test_so_many_deviations_above_the_mean() -> None:
    norms = np.append(np.full(99, 40.0), 140.0)  # mean 41, deviation 9.95
    found = find_cutoff(tally_of(norms), CutoffRule("sigma", 3.0))
    assert found.value == NormTally().snap(norms.mean() + 3 * norms.std())
    assert found.reason == "1 % of norms reach 70.85, 3 standard deviations above the mean"


@pytest.mark.parametrize("outliers", [lambda rng, size: np.full(size, 300.0), lambda rng, size: rng.gamma(9, 30, size)])
def test_a_percentile_takes_the_norms_of_its_bin_too(outliers: Callable[[Generator, int], np.ndarray]) -> None:
    rng = default_rng(0)
    norms = np.append(rng.uniform(40, 50, 9000), outliers(rng, 1000))
    tally = tally_of(norms)
    found = find_cutoff(tally, CutoffRule("percentile", 95.0))
    exact = np.quantile(norms, 0.95, method="inverted_cdf")
    assert found.value is not None
    assert exact / BIN < found.value <= exact
    assert found.value in tally.edges
    assert tally.above(found.value) >= (norms >= exact).sum() >= 500


@pytest.mark.parametrize(
    ("rule", "name"),
    [("150", "150"), ("mean+9sigma", "92.78, 9 standard deviations above the mean")],
)
def test_nothing_is_found_where_no_norm_reaches_the_cutoff(rule: str, name: str) -> None:
    found = find_cutoff(tally_of(np.array([40.0, 50.0] * 10 + [48.0])), parse_rule(rule))
    assert not found.found
    assert found.value is None
    if rule == "150":
        assert found.reason == f"no norm reaches {name}: the largest is 50"
    else:
        assert found.reason.startswith("no norm reaches ")
        assert found.reason.endswith("9 standard deviations above the mean: the largest is 50")


@pytest.mark.parametrize("rule", ["auto", "150", "mean+3sigma", "99.5%"])
def test_nothing_is_found_among_no_norms_or_zeros(rule: str) -> None:
    assert find_cutoff(NormTally(), parse_rule(rule)) == Cutoff(parse_rule(rule), None, "there are no norms")
    assert not find_cutoff(tally_of(np.zeros(100)), parse_rule(rule)).found


UNIMODAL: dict[str, Callable[[Generator, int], np.ndarray]] = {
    "normal": lambda rng, size: np.abs(rng.normal(47, 10, size)),
    "half-normal": lambda rng, size: np.abs(rng.normal(0, 1, size)),
    "lognormal 0.3": lambda rng, size: lognormal(rng, size, 47, 0.3),
    "lognormal 0.6": lambda rng, size: lognormal(rng, size, 47, 0.6),
    "gamma": lambda rng, size: rng.gamma(2, 10, size),
    "uniform": lambda rng, size: rng.uniform(0, 100, size),
    "exponential": lambda rng, size: rng.exponential(10, size),
    "Student t": lambda rng, size: np.abs(rng.standard_t(3, size)),
    "log-Laplace": lambda rng, size: 47 * np.exp(rng.laplace(0, 0.3, size)),
    "Pareto": lambda rng, size: 1 + rng.pareto(2, size),
    "less than twice": lambda rng, size: np.concatenate(mixture(rng, size, 0.05, (47, 0.05), (47 * 1.8, 0.05))),
    "two outliers": lambda rng, size: np.append(lognormal(rng, size - 2, 47, 0.1), [900.0, 950.0]),
    "high majority": lambda rng, size: np.concatenate(mixture(rng, size, 0.7, (47, 0.15), (300, 0.15))),
    "low minority": lambda rng, size: np.concatenate(mixture(rng, size, 0.97, (47, 0.15), (300, 0.15))),
    "constant": lambda rng, size: np.full(size, rng.uniform(1, 100)),
    "one": lambda rng, size: rng.uniform(1, 100, 1),
}


@pytest.mark.parametrize("name", UNIMODAL)
def test_no_cutoff_is_found_without_a_small_high_mode(name: str) -> None:
    for size, seeds in ((64, 50), (1_500, 50), (400_000, 2)):
        found = [auto(UNIMODAL[name](default_rng(seed), size)) for seed in range(seeds)]
        assert sum(cutoff.found for cutoff in found) <= seeds // 50
        assert {cutoff.reason for cutoff in found if not cutoff.found} == {
            "not bimodal: no separate second mode at least twice as high as the first"
        }


Groups = tuple[np.ndarray, np.ndarray]
BIMODAL: dict[str, Callable[[Generator, int], Groups]] = {
    "2 %": lambda rng, size: mixture(rng, size, 0.02, (47, 0.15), (300, 0.3)),
    "10 %": lambda rng, size: mixture(rng, size, 0.1, (47, 0.15), (300, 0.3)),
    "0.3 %": lambda rng, size: mixture(rng, size, 0.003, (47, 0.15), (300, 0.2)),
    "CLIP": lambda rng, size: mixture(rng, size, 0.03, (12, 0.2), (70, 0.2)),
    "three times": lambda rng, size: mixture(rng, size, 0.02, (47, 0.1), (141, 0.1)),
    "equal outliers": lambda rng, size: mixture(rng, size, 0.02, (47, 0.15), (300, 0)),
    "equal twice": lambda rng, size: mixture(rng, size, 0.02, (47, 0), (120, 0)),
    "equal rest": lambda rng, size: mixture(rng, size, 0.02, (47, 0), (300, 0.3)),
}


@pytest.mark.parametrize("name", BIMODAL)
def test_a_small_high_mode_is_cut_off(name: str) -> None:
    for size, seeds in ((1_369, 100), (400_000, 2)):
        missed = 0
        for seed in range(seeds):
            low, high = BIMODAL[name](default_rng(seed), size)
            found = auto(np.concatenate([low, high])).value
            missed += found is None
            # A stray norm in the gap may be on either side; equal outliers have none.
            allowed = 0 if "equal" in name and "rest" not in name else max(2, 0.01 * len(high))
            assert found is None or (low >= found).sum() + (high < found).sum() <= allowed
        assert missed <= seeds // 100


@pytest.mark.parametrize("share", [0.001, 0.02])
def test_a_thin_bridge_between_the_modes_does_not_hide_them(share: float) -> None:
    rng = default_rng(0)
    low, high = mixture(rng, 400_000, share, (47, 0.15), (300, 0.3))
    bridge = np.exp(rng.uniform(np.log(50), np.log(500), 400))
    found = auto(np.concatenate([low, high, bridge]))
    assert found.value is not None
    assert (low >= found.value).sum() <= 1e-4 * len(low)
    assert (high < found.value).sum() <= 0.01 * len(high)
    assert found.reason.startswith("bimodal: ")


def test_three_outliers_of_sixty_four_patches_are_enough() -> None:
    for seed in range(200):
        low, high = mixture(default_rng(seed), 64, 0.0, (47, 0.15), (47 * 20, 0.1))
        tally = tally_of(np.concatenate([low, high]))
        found = find_cutoff(tally, AUTO).value
        assert found is not None
        assert tally.above(found) == 3
        # In the middle of the gap, on the scale of logarithms, to within two bins.
        assert found == pytest.approx(np.sqrt(low.max() * high.min()), rel=0.02)


def test_the_reason_names_share_and_modes() -> None:
    found = auto(np.repeat([47.0, 312.0], [976, 24]))
    match = re.fullmatch("bimodal: 2.4 % of norms lie about (.*), the rest about (.*), nothing between", found.reason)
    assert match
    assert float(match[1]) == pytest.approx(312, rel=0.01)
    assert float(match[2]) == pytest.approx(47, rel=0.01)


def test_the_wider_gap_wins_over_one_within_the_outliers() -> None:
    rng = default_rng(1)
    clusters = [lognormal(rng, many, centre, 0.05) for many, centre in ((960, 47), (20, 300), (20, 800))]
    found = auto(np.concatenate(clusters)).value
    assert found is not None
    assert clusters[0].max() < found < clusters[1].min()


def test_two_modes_of_the_majority_are_not_told_apart() -> None:
    rng = default_rng(1)
    clusters = [lognormal(rng, many, centre, 0.05) for many, centre in ((580, 47), (400, 120), (20, 800))]
    found = auto(np.concatenate(clusters)).value
    assert found is not None
    assert clusters[1].max() < found < clusters[2].min()


@given(st.floats(1e-2, 1e3), st.integers(0, 50), st.sampled_from(sorted(BIMODAL)))
@settings(deadline=None, max_examples=40)
def test_a_factor_on_the_norms_is_one_on_the_cutoff(factor: float, seed: int, name: str) -> None:
    norms = np.concatenate(BIMODAL[name](default_rng(seed), 2_000))
    once, scaled = auto(norms).value, auto(norms * factor).value
    assert once is not None
    assert scaled is not None
    if name in ("equal outliers", "equal twice", "three times"):
        assert scaled == pytest.approx(once * factor, rel=0.021)
    assert ((norms * factor >= scaled) == (norms >= once)).mean() > 0.999


def test_an_edge_known_in_advance_changes_no_cutoff() -> None:
    norms = np.concatenate(BIMODAL["2 %"](default_rng(3), 5_000))
    expected = auto(norms)
    for edge in (1e-9, 46.9, 105.0, 300.0, 1e12):
        assert find_cutoff(tally_of(norms, edge), AUTO) == expected


def test_counts_of_a_hundred_thousand_images_are_no_obstacle() -> None:
    low, high = mixture(default_rng(0), 100_000, 0.001, (47, 0.15), (300, 0.2))
    tally = tally_of(np.concatenate([low, high]))
    for _ in range(10):  # doubles the norms
        tally.counts += tally.counts
        tally._count += tally._count
    found = find_cutoff(tally, AUTO).value
    assert tally.count > 10**8
    assert found is not None
    assert low.max() < found < high.min()
