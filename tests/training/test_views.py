"""Views, laid back where they belong, against what they were cut from."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lostreg.errors import OptionError
from lostreg.training.views import AGGREGATES, Layout, crop, draw_views, lay_back

LAYOUT = Layout.of(7 * 4, 4)


def test_windows_are_whole_patches_and_shifted_by_at_most_15_percent() -> None:
    assert Layout.of(224, 14) == Layout(14, 16, 2)
    assert Layout.of(237, 14) == Layout(14, 16, 2)
    assert (LAYOUT.picture, LAYOUT.pixels, LAYOUT.shifts) == (9, 36, 18)
    with pytest.raises(OptionError, match=r"max_side 97 is too small: .* at least 98 pixels"):
        Layout.of(97, 14)


@given(count=st.integers(1, 18), seed=st.integers(0, 99))
def test_views_differ_and_begin_with_the_picture_as_it_is(count: int, seed: int) -> None:
    views = draw_views(LAYOUT, count, np.random.default_rng(seed))
    assert len(set(views)) == count
    assert views[0] == LAYOUT.middle
    assert all(0 <= view.row <= 2 and 0 <= view.column <= 2 for view in views)


@pytest.mark.parametrize("count", [0, 19])
def test_there_are_only_so_many_views(count: int) -> None:
    with pytest.raises(OptionError, match="from 1 to 18"):
        draw_views(LAYOUT, count, np.random.default_rng(0))


@pytest.mark.parametrize("name", AGGREGATES)
@given(count=st.integers(1, 18), seed=st.integers(0, 99))
def test_what_views_agree_on_is_what_they_were_cut_from(name: str, count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    truth = torch.from_numpy(generator.normal(size=(9, 9, 5))).float()
    views = draw_views(LAYOUT, count, generator)
    laid = lay_back(torch.stack([crop(truth, view, LAYOUT.shape).flatten(0, 1) for view in views]), views, LAYOUT)
    agreed = AGGREGATES[name](laid).view(9, 9, 5)
    seen = torch.zeros(9, 9, dtype=torch.bool)
    for view in views:
        seen[view.row : view.row + 7, view.column : view.column + 7] = True
    torch.testing.assert_close(agreed[seen], truth[seen])
    assert agreed[~seen].isnan().all()


@pytest.mark.parametrize(("name", "tolerance"), [("median", 0.0), ("trimmed", 0.0), ("mean", 0.5)])
def test_what_stays_with_a_position_is_taken_out(name: str, tolerance: float) -> None:
    truth = torch.from_numpy(np.random.default_rng(0).normal(size=(9, 9, 5))).float()
    views = draw_views(LAYOUT, 9, np.random.default_rng(1))
    windows = torch.stack([crop(truth, view, LAYOUT.shape).flatten(0, 1).clone() for view in views])
    windows[:, 24] += 4  # the patch in the middle of every window
    agreed = AGGREGATES[name](lay_back(windows, views, LAYOUT)).view(9, 9, 5)
    error = (crop(agreed, LAYOUT.middle, LAYOUT.shape) - crop(truth, LAYOUT.middle, LAYOUT.shape)).abs()
    assert error[3, 3].max() <= tolerance + 1e-5  # seen nine times, at the artifact's place once or, mirrored, twice


def test_the_median_of_an_even_number_is_between_the_two_in_the_middle() -> None:
    laid = torch.tensor([1.0, 2.0, 4.0, 100.0, torch.nan])[:, None, None].expand(5, 1, 2)
    assert AGGREGATES["median"](laid).tolist() == [[3.0, 3.0]]
    assert AGGREGATES["trimmed"](laid).tolist() == [[3.0, 3.0]]  # 2 and 4 lie nearest to it
