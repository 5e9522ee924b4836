"""Features whose similarities are exact, so that an oracle must agree to the bit."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

integers = st.integers(-3, 3).map(float)
CLEAR = 2e-5  # what decisions must be clear by, where sums are rounded


@st.composite
def integer_features(draw: st.DrawFn, batch: int | None = None) -> tuple[np.ndarray, tuple[int, int]]:
    images = batch or draw(st.integers(1, 3))
    grid = (draw(st.integers(1, 6)), draw(st.integers(1, 6)))
    depth = draw(st.integers(1, 5))
    shape = (images, grid[0] * grid[1], depth)
    return draw(arrays(np.float32, shape, elements=integers)), grid


def exact_unit_vectors(seed: int) -> np.ndarray:
    """Features of 2 images of 6x7 patches whose products are exact: one-hot, or a signed half in each of 4 places."""
    random = np.random.default_rng(seed)
    vectors = np.zeros((2, 42, 16), dtype=np.float32)
    for vector in vectors.reshape(-1, 16):
        if random.random() < 0.3:
            vector[random.integers(16)] = random.choice([-1, 1])
        else:
            vector[random.choice(16, 4, replace=False)] = random.choice([-0.5, 0.5], 4)
    return vectors
