"""Linear heads against scikit-learn's, and on tokens of which it is known what they hold."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression, Ridge

from lostreg.errors import DatasetError
from lostreg.probing import heads
from lostreg.probing.heads import PENALTIES, Head, Rows, choose, fit_ridge, fit_softmax, softmax_loss, squared_error

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def tokens_of(count: int, dimensions: int = 6, seed: int = 0) -> np.ndarray:
    """Of unlike means and scales."""
    random = np.random.default_rng(seed)
    scale = np.linspace(0.1, 30, dimensions)
    return (random.normal(size=(count, dimensions)) * scale + 50 * scale[::-1]).astype(np.float32)


def rows_of(tokens: np.ndarray, targets: np.ndarray, chosen: np.ndarray | None = None) -> Rows:
    return Rows(tokens, targets, np.arange(len(tokens)) if chosen is None else chosen, CPU)


def probabilities(head: Head, tokens: np.ndarray) -> np.ndarray:
    return head(torch.from_numpy(tokens)).softmax(dim=1).numpy()


@pytest.mark.parametrize("penalty", [1.0, 1e-2])
def test_softmax_regression_is_scikit_learns(penalty: float) -> None:
    tokens = tokens_of(300)
    codes = (tokens[:, 5] > tokens[:, 5].mean()).astype(int) + np.random.default_rng(1).integers(0, 2, 300)
    (head,) = fit_softmax(rows_of(tokens, codes), 3, [penalty])
    oracle = LogisticRegression(C=1 / (penalty * len(tokens)), tol=1e-8, max_iter=5000)
    standard = ((tokens - tokens.mean(axis=0)) / tokens.std(axis=0)).astype(np.float64)
    expected = oracle.fit(standard, codes).predict_proba(standard)
    np.testing.assert_allclose(probabilities(head, tokens), expected, atol=5e-3)


@pytest.mark.parametrize("penalty", [1.0, 1e-3])
def test_ridge_regression_is_scikit_learns(penalty: float) -> None:
    tokens, random = tokens_of(200), np.random.default_rng(1)
    values = (tokens @ random.normal(size=6) + random.normal(size=200)).astype(np.float32)
    weights = random.uniform(0, 1, 200).astype(np.float32)
    (head,) = fit_ridge(rows_of(tokens, np.stack([values, weights], axis=1)), 1, [penalty])
    standard = ((tokens - tokens.mean(axis=0)) / tokens.std(axis=0)).astype(np.float64)
    oracle = Ridge(penalty * weights.sum(), solver="cholesky").fit(standard, values, weights)
    found = head(torch.from_numpy(tokens))[:, 0].numpy()
    np.testing.assert_allclose(found, oracle.predict(standard), rtol=1e-4, atol=1e-2)


def fit_and_choose(tokens: np.ndarray, targets: np.ndarray, fit: Callable, loss: Callable, outputs: int) -> Head:
    """On the first half, chosen on the third quarter."""
    half, last = len(tokens) // 2, len(tokens) * 3 // 4
    rows = rows_of(tokens, targets, np.arange(half))
    chosen_on = Rows(tokens, targets, np.arange(half, last), CPU, like=rows)
    return choose(fit(rows, outputs, PENALTIES), loss, chosen_on)


@pytest.mark.parametrize("seed", range(3))
def test_what_tokens_hold_is_read_off_them_and_what_they_do_not_is_not(seed: int) -> None:
    random = np.random.default_rng(seed)
    codes = random.integers(0, 4, 2000)
    tokens = np.concatenate([np.eye(4)[codes] * 3 + 7, random.normal(size=(2000, 12)), np.ones((2000, 1))], axis=1)
    tokens = tokens.astype(np.float32)
    head = fit_and_choose(tokens, codes, fit_softmax, softmax_loss, 4)
    measured = torch.from_numpy(tokens[1500:])
    assert (head(measured).argmax(dim=1).numpy() == codes[1500:]).all()
    shuffled = random.permutation(codes)
    head = fit_and_choose(tokens, shuffled, fit_softmax, softmax_loss, 4)
    accuracy = np.mean(head(measured).argmax(dim=1).numpy() == shuffled[1500:])
    assert abs(accuracy - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 500)  # four standard errors
    assert head.penalty >= 0.1

    depths = np.stack([codes * 2.5 + 1, np.ones(2000)], axis=1).astype(np.float32)
    head = fit_and_choose(tokens, depths, fit_ridge, squared_error, 1)
    np.testing.assert_allclose(head(measured)[:, 0].numpy(), depths[1500:, 0], atol=1e-3)
    depths[:, 0] = random.permutation(depths[:, 0])
    head = fit_and_choose(tokens, depths, fit_ridge, squared_error, 1)
    error = np.sqrt(np.mean((head(measured)[:, 0].numpy() - depths[1500:, 0]) ** 2))
    assert error == pytest.approx(depths[1500:, 0].std(), rel=0.05)


@given(st.integers(0, 2**31), st.integers(2, 4))
@settings(deadline=None, max_examples=25)
def test_shares_of_a_patch_count_as_its_pixels_would(seed: int, classes: int) -> None:
    random = np.random.default_rng(seed)
    counts = random.integers(0, 4, (12, classes))
    counts[0, 0] += 1
    tokens = random.normal(size=(12, 3)).astype(np.float32)
    head = Head(torch.randn(3, classes), torch.randn(classes), torch.zeros(3), torch.ones(3), 0.0)
    places, codes = (
        np.repeat(np.arange(12), counts.sum(axis=1)),
        np.concatenate([np.repeat(np.arange(classes), row) for row in counts]),
    )
    by_pixel = softmax_loss(head, rows_like(tokens[places], codes))
    by_patch = softmax_loss(head, rows_like(tokens, (counts / 16).astype(np.float32)))
    assert by_patch == pytest.approx(by_pixel, rel=1e-4)


def rows_like(tokens: np.ndarray, targets: np.ndarray) -> Rows:
    """Rows that are left as they are."""
    rows = Rows(
        np.array([[-1.0], [1.0]], np.float32).repeat(tokens.shape[1], axis=1), np.zeros(2, int), np.arange(2), CPU
    )
    return Rows(tokens, targets, np.arange(len(tokens)), CPU, like=rows)


def test_a_head_without_weights_knows_how_frequent_classes_are() -> None:
    tokens, codes = tokens_of(10), np.array([0] * 6 + [1] * 4)
    (head,) = fit_softmax(rows_of(tokens, codes), 3, [np.inf])
    np.testing.assert_allclose(probabilities(head, tokens), [[0.6, 0.4, 0]] * 10, atol=1e-6)
    depths = np.array([[4, 1], [1, 0.5]] * 5, np.float32)
    (head,) = fit_ridge(rows_of(tokens, depths), 1, [np.inf])
    np.testing.assert_allclose(head(torch.from_numpy(tokens)).numpy(), [[3]] * 10, atol=1e-6)


def test_rows_may_be_read_again_and_again_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, codes = tokens_of(90), np.arange(90) % 3
    whole = next(fit_softmax(rows_of(tokens, codes, np.arange(0, 90, 2)), 3, [0.1]))
    monkeypatch.setattr(heads, "_CHUNK", 7)
    monkeypatch.setattr(heads, "available_bytes", lambda _: 0)
    pieces = next(fit_softmax(rows_of(tokens, codes, np.arange(0, 90, 2)), 3, [0.1]))
    np.testing.assert_allclose(probabilities(pieces, tokens), probabilities(whole, tokens), atol=2e-3)


def test_rows_must_be_there() -> None:
    with pytest.raises(DatasetError, match="nothing is known of any pixel"):
        rows_of(tokens_of(3), np.zeros(3, int), np.zeros(0, int))


def test_penalties_that_are_no_better_twice_in_a_row_end_the_search() -> None:
    losses = dict(enumerate([5.0, 4.0, 4.0, 3.0, 3.5, 3.0, 0.0]))
    made = []

    def path() -> Iterator[Head]:
        for penalty in losses:
            made.append(penalty)
            yield Head(torch.zeros(1, 1), torch.zeros(1), torch.zeros(1), torch.ones(1), penalty)

    rows = rows_of(tokens_of(2), np.zeros(2, int))
    assert choose(path(), lambda head, _: losses[int(head.penalty)], rows).penalty == 3
    assert made == [0, 1, 2, 3, 4, 5]
