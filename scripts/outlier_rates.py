"""How often the rule `auto` for outliers cries wolf, and how often it finds them, on simulated norms.

python scripts/outlier_rates.py --out eval/results/outlier-rates.json
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lostreg.artifacts.outliers import CutoffRule, NormTally, find_cutoff
from lostreg.jsonio import write_json
from lostreg.runs.results import package_versions

Norms = NDArray[np.float64]
Family = Callable[[np.random.Generator, int], Norms]

SIZES: Final = (64, 1500)  # tokens: of a small image, and of one of 518x518 pixels or a little more


def mixture(share: float, high: tuple[float, float], low: tuple[float, float]) -> Family:
    """A share of lognormal norms about one value, the rest about another; (median, sigma) each, at least 3 high."""

    def draw(random: np.random.Generator, count: int) -> Norms:
        number = max(3, round(share * count))
        parts = [(high, number), (low, count - number)]
        return np.concatenate([median * np.exp(sigma * random.standard_normal(n)) for (median, sigma), n in parts])

    return draw


ONE_MODE: Final[dict[str, Family]] = {
    "normal, 47 +- 5": lambda random, count: np.abs(random.normal(47, 5, count)),
    "lognormal, 0.15": lambda random, count: random.lognormal(3.85, 0.15, count),
    "lognormal, 0.6": lambda random, count: random.lognormal(3.85, 0.6, count),
    "gamma, 2": lambda random, count: random.gamma(2, 20, count),
    "exponential": lambda random, count: random.exponential(40, count),
    "uniform": lambda random, count: random.uniform(10, 80, count),
    "folded Student t, 3": lambda random, count: np.abs(random.standard_t(3, count)),
    "Pareto, 2": lambda random, count: 40 * (1 + random.pareto(2, count)),
}
SCATTERED: Final[dict[str, Family]] = {
    "5 % scattered, sigma 0.8": mixture(0.05, (47, 0.8), (47, 0.15)),
    "1 % scattered, sigma 0.5": mixture(0.01, (47, 0.5), (47, 0.1)),
}
TWO_MODES: Final[dict[str, Family]] = {
    "2 % about 300": mixture(0.02, (300, 0.3), (47, 0.15)),
    "10 % about 300": mixture(0.10, (300, 0.3), (47, 0.15)),
    "3 tokens, 20 times": mixture(0.0, (940, 0.1), (47, 0.15)),
    "3 % about 70, rest about 12": mixture(0.03, (70, 0.2), (12, 0.2)),
    "3 times, 5 %": mixture(0.05, (141, 0.1), (47, 0.15)),
}


def rate(family: Family, count: int, repeats: int) -> float:
    """Share of samples in which outliers are found, in per cent."""
    found = 0
    for seed in range(repeats):
        tally = NormTally()
        tally.add(family(np.random.default_rng(seed), count))
        found += find_cutoff(tally, CutoffRule("auto")).found
    return 100 * found / repeats


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write")
    parser.add_argument("--repeats", type=int, default=1000, help="samples of each kind (default: 1000)")
    args = parser.parse_args(argv)
    groups = {"one mode": ONE_MODE, "one mode, a few scattered": SCATTERED, "two modes": TWO_MODES}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for group, families in groups.items():
        found[group] = {}
        for name, family in tqdm(families.items(), desc=group):
            found[group][name] = {str(count): round(rate(family, count, args.repeats), 2) for count in SIZES}
            print(group, name, found[group][name])
    write_json(args.out, {"repeats": args.repeats, "percent_found": found, "versions": package_versions()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
