"""Linear heads on frozen tokens: softmax regression by SciPy's L-BFGS-B, ridge regression by its Cholesky solver.

Both are convex: a head depends on its tokens and its penalty alone. The penalty is half the squared norm of the weights
on standardised tokens, biases left out, beside the mean loss. Rows of tokens are read in chunks, so that more of them
may be trained on than memory holds.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg, optimize
from torch import Tensor
from torch.nn import functional

from lostreg.errors import DatasetError
from lostreg.inference.memory import available_bytes
from lostreg.methods.exact import exact_float32

PENALTIES: Final = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # of equally good ones the first is taken
_CHUNK: Final = 1 << 14  # rows
_HELD_SHARE: Final = 0.25  # of free memory: rows that take no more stay on the device, standardised
_MAX_ITERATIONS: Final = 300
_TOLERANCE: Final = 1e-6  # of the mean loss, by which the last step must lower it
_PATIENCE: Final = 2  # penalties in a row that are no better: weaker ones take longest, and overfit more

Targets = NDArray[Any]
"""Of softmax regression the class of each row, (n,) integers, or its share of each class, (n, C), where a row counts as
much as it sums to; of ridge regression the value and the weight of each row, (n, 2)."""


class Rows:
    """Some rows of tokens with their targets, standardised, in chunks.

    Args:
        tokens: (n, D), float32 and finite, in memory or mapped from a file.
        targets: of all of them.
        chosen: places of the rows that count.
        device: where products are taken.
        like: rows whose mean and scale are taken; None for their own.

    Raises:
        DatasetError: if there are none.
    """

    def __init__(
        self,
        tokens: NDArray[np.float32],
        targets: Targets,
        chosen: NDArray[np.int64],
        device: torch.device,
        like: "Rows | None" = None,
    ) -> None:
        if not len(chosen):
            raise DatasetError("nothing is known of any pixel of the images that are trained on")
        self._tokens, self._targets, self._chosen = tokens, targets, chosen
        self.device = device
        self.dimensions = tokens.shape[1]
        self.moments: tuple[NDArray[np.float64], NDArray[np.float64]]  # mean and scale, (D,) each
        self.moments = _moments(tokens, chosen) if like is None else like.moments
        self._held: list[tuple[Tensor, Tensor]] | None = None
        free = available_bytes(device)
        if free is not None and 4 * len(chosen) * self.dimensions <= _HELD_SHARE * free:
            self._held = list(self._read())

    def __len__(self) -> int:
        return len(self._chosen)

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Standardised tokens (m, D), float32, and their targets (m, ...), on the device."""
        return self._read() if self._held is None else iter(self._held)

    def _read(self) -> Iterator[tuple[Tensor, Tensor]]:
        mean, scale = (_float32(values, self.device) for values in self.moments)
        for start in range(0, len(self), _CHUNK):
            places = self._chosen[start : start + _CHUNK]
            tokens = torch.from_numpy(self._tokens[places]).to(self.device)
            yield (tokens - mean) / scale, torch.from_numpy(self._targets[places]).to(self.device)


@dataclass(frozen=True)
class Head:
    """A linear map from tokens to outputs.

    Attributes:
        weight: on standardised tokens, (D, C), float32.
        bias: (C,), float32.
        mean: of the tokens, (D,), float32.
        scale: of the tokens, (D,), float32.
        penalty: that it was fitted with.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor
    penalty: float

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Outputs (n, C) of tokens (n, D)."""
        with exact_float32(tokens.device):
            return self.standardised((tokens - self.mean) / self.scale)

    def standardised(self, tokens: Tensor) -> Tensor:
        """The same of tokens that are standardised already."""
        return tokens @ self.weight + self.bias


Fit = Callable[[Rows, int, Sequence[float]], Iterator[Head]]
Loss = Callable[[Head, Rows], float]


def fit_softmax(rows: Rows, classes: int, penalties: Sequence[float] = PENALTIES) -> Iterator[Head]:
    """Softmax regression with one penalty after the other, each from where the one before ended.

    Args:
        rows: with classes or shares of classes.
        classes: how many there are.
        penalties: the strongest first; infinity is a head without weights.
    """
    parameters = np.zeros((rows.dimensions + 1, classes))  # biases in the last row

    def objective(flat: NDArray[np.float64], penalty: float) -> tuple[float, NDArray[np.float64]]:
        now = flat.reshape(parameters.shape)
        loss, slope = _softmax_loss(rows, _head(now, rows, penalty), classes)
        loss += 0.5 * penalty * float((now[:-1] ** 2).sum())
        slope[:-1] += penalty * now[:-1]
        return loss, slope.ravel()

    for penalty in penalties:
        if np.isinf(penalty):
            yield _head(_prior(rows, classes, rows.dimensions), rows, penalty)
            continue
        found = optimize.minimize(
            objective,
            parameters.ravel(),
            (penalty,),
            method="L-BFGS-B",
            jac=True,
            options={"maxiter": _MAX_ITERATIONS, "ftol": _TOLERANCE, "gtol": 1e-5},
        )
        parameters = found.x.reshape(parameters.shape)
        yield _head(parameters, rows, penalty)


def softmax_loss(head: Head, rows: Rows) -> float:
    """Mean cross entropy of rows, each with its weight."""
    return _softmax_loss(rows, head, len(head.bias), with_slope=False)[0]


def fit_ridge(rows: Rows, outputs: int, penalties: Sequence[float] = PENALTIES) -> Iterator[Head]:
    """Ridge regression with each penalty, from the normal equations in float64.

    Args:
        rows: with values and weights, which are not all 0.
        outputs: of the head: 1.
        penalties: infinity is a head without weights.
    """
    size = rows.dimensions + outputs
    gram, product, total = np.zeros((size, size)), np.zeros(size), 0.0
    for tokens, targets in rows.chunks():
        row = np.pad(tokens.cpu().numpy().astype(np.float64), ((0, 0), (0, 1)), constant_values=1)
        value, weight = targets.cpu().numpy().astype(np.float64).T
        gram += (row * weight[:, None]).T @ row
        product += row.T @ (weight * value)
        total += float(weight.sum())
    ridge = np.ones(size)
    ridge[-1] = 0  # the bias
    for penalty in penalties:
        if np.isinf(penalty):
            solution = np.zeros(size)
            solution[-1] = product[-1] / total
        else:
            solution = linalg.solve(gram / total + np.diag(penalty * ridge), product / total, assume_a="pos")
        yield _head(solution[:, None], rows, penalty)


def squared_error(head: Head, rows: Rows) -> float:
    """Mean squared error of rows, each with its weight."""
    error = total = 0.0
    with torch.no_grad(), exact_float32(rows.device):
        for tokens, targets in rows.chunks():
            error += float(((head.standardised(tokens)[:, 0] - targets[:, 0]) ** 2 * targets[:, 1]).sum())
            total += float(targets[:, 1].sum())
    return error / total


def choose(heads: Iterator[Head], loss: Loss, rows: Rows) -> Head:
    """The head with the lowest loss over these rows, the first of several; no more are fitted after two no better."""
    best = next(heads)
    lowest, worse = loss(best, rows), 0
    for head in heads:
        found = loss(head, rows)
        if found < lowest:
            best, lowest, worse = head, found, 0
        else:
            worse += 1
        if worse == _PATIENCE:
            break
    return best


@torch.no_grad()
def _softmax_loss(
    rows: Rows, head: Head, classes: int, *, with_slope: bool = True
) -> tuple[float, NDArray[np.float64]]:
    """Mean cross entropy, and its slope by weights and, in the last row, biases: (D + 1, C)."""
    loss = total = 0.0
    slope = np.zeros((rows.dimensions + 1, classes))
    with exact_float32(rows.device):
        for tokens, targets in rows.chunks():
            shares = targets if targets.ndim == 2 else functional.one_hot(targets, classes).to(tokens.dtype)
            scores = head.standardised(tokens).log_softmax(dim=1)
            loss -= float((shares * scores).sum())
            weight = shares.sum(dim=1, keepdim=True)
            total += float(weight.sum())
            if with_slope:
                error = scores.exp() * weight - shares
                slope[:-1] += (tokens.T @ error).cpu().numpy()
                slope[-1] += error.sum(dim=0).cpu().numpy()
    return loss / total, slope / total


def _prior(rows: Rows, classes: int, dimensions: int) -> NDArray[np.float64]:
    """Parameters of a head that says how frequent each class is."""
    counts = np.zeros(classes)
    for _, targets in rows.chunks():
        shares = targets if targets.ndim == 2 else functional.one_hot(targets, classes)
        counts += shares.sum(dim=0).cpu().numpy()
    parameters = np.zeros((dimensions + 1, classes))
    parameters[-1] = np.log(np.maximum(counts, 1e-9) / counts.sum())
    return parameters


def _head(parameters: NDArray[np.float64], rows: Rows, penalty: float) -> Head:
    """Of weights and, in the last row, biases."""
    values = (parameters[:-1], parameters[-1], *rows.moments)
    weight, bias, mean, scale = (_float32(value, rows.device) for value in values)
    return Head(weight, bias, mean, scale, penalty)


def _moments(tokens: NDArray[np.float32], chosen: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of each dimension, (D,); 1 where a dimension does not vary."""
    first = tokens[chosen[0]].astype(np.float64)  # near the mean: less is lost in the difference of squares
    total, squares = np.zeros_like(first), np.zeros_like(first)
    for start in range(0, len(chosen), _CHUNK):
        rest = tokens[chosen[start : start + _CHUNK]] - first
        total += rest.sum(axis=0)
        squares += (rest**2).sum(axis=0)
    mean = total / len(chosen)
    variance = (squares / len(chosen) - mean**2).clip(min=0)
    mean += first
    still = np.sqrt(variance) <= 1e-6 * np.abs(mean)
    return mean, np.where(still, 1.0, np.sqrt(variance))


def _float32(values: NDArray[np.float64], device: torch.device) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(device)
