"""DINO-seg against the oracle, and on maps one can check by hand."""

import numpy as np
import pytest
import torch
from dispatch import DEVICE, fake_gpu, needs_simulated_pinning
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from reference_spectral import box_around, reference_dinoseg

from lostreg.errors import OptionError
from lostreg.methods.dinoseg import HEAD, attended_maps, dinoseg_objects
from lostreg.methods.lost import Objects

pytestmark = pytest.mark.usefixtures("one_thread")


def objects_of(attention: np.ndarray, grid: tuple[int, int], head: int = HEAD) -> list[Objects]:
    maps = attended_maps(torch.from_numpy(attention), grid, head)
    features = torch.randn(len(attention), grid[0] * grid[1], 4, generator=torch.Generator().manual_seed(0))
    return dinoseg_objects(maps.to_host(), features, grid)


@given(arrays(np.float32, (2, 6, 30), elements=st.integers(0, 16).map(float)), st.integers(0, 5))
@settings(deadline=None, max_examples=40)
def test_objects_equal_the_oracles(attention: np.ndarray, head: int) -> None:
    assume((attention[:, head].sum(axis=1) > 0).all())
    for image, objects in zip(attention, objects_of(attention, (5, 6), head), strict=True):
        mask = reference_dinoseg(image[head], (5, 6))
        np.testing.assert_array_equal(objects.masks, [mask])
        assert objects.xyxy.tolist() == [list(box_around(mask))]
        most = max(map(tuple, np.argwhere(mask)), key=lambda place: image[head].reshape(5, 6)[place])
        assert tuple(objects.seeds[0].tolist()) == most
        assert sorted(objects.heat.ravel().tolist()) == list(range(30))
        assert objects.heat.ravel().tolist() == np.argsort(np.argsort(-image[head], kind="stable")).tolist()


def test_the_larger_part_of_one_head_is_boxed_even_if_it_is_the_last_or_the_only_one() -> None:
    attention = np.full((3, 6, 6, 8), 1e-4, dtype=np.float32)
    attention[:, HEAD, 3:5, 4:7] = 1
    attention[1, HEAD, 0:2, 0] = 1
    attention[2, HEAD, 5, 0] = 5
    attention[:, 0, 0, 0] = 1000  # of another head
    found = objects_of(attention.reshape(3, 6, 48), (6, 8))
    # 60 % of 6 patches are the first 4 in reading order, of 8 are 5, and 5 of 11 are in one patch.
    assert [objects.masks.sum() for objects in found] == [4, 3, 2]
    assert [objects.xyxy.tolist() for objects in found] == [[[4, 3, 7, 5]], [[4, 3, 7, 4]], [[4, 3, 6, 4]]]


def test_no_attention_to_any_patch_is_no_error() -> None:
    (objects,) = objects_of(np.zeros((1, 6, 30), np.float32), (5, 6))
    assert objects.xyxy.tolist() == [[0, 0, 1, 1]]
    assert objects_of(np.zeros((0, 6, 30), np.float32), (5, 6)) == []


@needs_simulated_pinning
def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_gpu(monkeypatch) as dispatched:
        attention = torch.zeros(2, 6, 20, device=DEVICE)
        dispatched.take()
        maps = attended_maps(attention, (4, 5))
        assert maps.masks.device == DEVICE
        assert not dispatched.take()[1]


def test_bad_input_says_what_was_expected() -> None:
    with pytest.raises(OptionError, match=r"N = 5 \* 5 > 0, not \(1, 6, 30\)"):
        attended_maps(torch.ones(1, 6, 30), (5, 5))
    with pytest.raises(OptionError, match="dinoseg reads head 4, counted from 0, of the attention: it has 3"):
        attended_maps(torch.ones(1, 3, 30), (5, 6))
    attention, features = torch.ones(2, 6, 30), torch.ones(2, 30, 4)
    features[1, 3, 2] = torch.nan
    with pytest.raises(OptionError, match="finite"):
        dinoseg_objects(attended_maps(attention, (5, 6)), features, (5, 6))
    attention[0, HEAD, 3] = torch.inf
    with pytest.raises(OptionError, match="finite"):
        dinoseg_objects(attended_maps(attention, (5, 6)), torch.ones(2, 30, 4), (5, 6))
