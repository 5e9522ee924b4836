"""Steps that PyTorch takes in several passes over memory, as one Triton kernel each; a GPU waits for its memory there.

Triton comes with PyTorch for Linux, and compiles a kernel when it is first needed, which takes a C compiler too. Who
calls asks `usable` first and keeps the way of PyTorch for all other cases.
"""

from __future__ import annotations  # the kernels' annotations name Triton's types, which may be absent

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from lostreg.errors import LostregWarning, is_out_of_memory

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_TILE: Final = (16, 512)  # rows and columns of similarities that one program counts
# What changes from pack to pack: a kernel is not compiled anew for each value of these.
_VARIABLE: Final = ("first_row", "first_column", "rows", "columns", "limits", "patches")


def usable(tensor: Tensor) -> bool:
    """Whether the kernels take a tensor: an ordinary contiguous one on a GPU that Triton has been tried on.

    Where they fail on a GPU, a `LostregWarning` says so once. Code under `torch.compile` is fused there.
    """
    return (
        tensor.device.type == "cuda"
        and not torch.compiler.is_compiling()
        and type(tensor) is Tensor
        and tensor.is_contiguous()
        and _work_on(tensor.device)
    )


@cache
def _work_on(device: torch.device) -> bool:
    if triton is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    row = torch.zeros(1, 64, device=device)
    try:
        count_above(row[None, :, :1], row[:, :1], row[None, :, :1].long(), 0, 0)
        add_scaled(row, row.bfloat16(), row[0])
        layer_norm(row, row[0], row[0], 1e-6, torch.bfloat16)
    except Exception as error:  # whatever compilers and drivers raise
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(f"Triton does not work here ({reason}): going on with PyTorch alone", LostregWarning, 2)
        return False
    return True


def _kernel(function: Callable[..., None]) -> Any:
    return function if triton is None else triton.jit(function, do_not_specialize=_VARIABLE)


def count_above(values: Tensor, thresholds: Tensor, counts: Tensor, first_row: int, first_column: int) -> None:
    """Count what each row and each column of a part of a matrix has above each threshold, in one pass.

    Args:
        values: the part, shape (B, R, C), float32.
        thresholds: K an image, shape (B, K), float32.
        counts: of the whole matrix, shape (B, K, N), int64, contiguous: added to. Values on its diagonal do not count.
        first_row: where the part's rows begin, of N.
        first_column: where its columns begin. If that is where its rows begin, then columns are not counted.
    """
    batch, rows, columns = values.shape
    grid = (batch, triton.cdiv(rows, _TILE[0]), triton.cdiv(columns, _TILE[1]))
    sizes = (first_row, first_column, rows, columns, *counts.shape[1:])
    with torch.cuda.device(values.get_device()):
        _count_above[grid](
            values.contiguous(), thresholds.contiguous(), counts, *sizes, first_row == first_column, *_TILE
        )


@_kernel
def _count_above(  # type: ignore[no-untyped-def]
    values,
    thresholds,
    counts,
    first_row,
    first_column,
    rows,
    columns,
    limits,
    patches,
    diagonal: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
) -> None:
    image = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * tile_rows + tl.arange(0, tile_rows)
    column = tl.program_id(2) * tile_columns + tl.arange(0, tile_columns)
    counted = (row < rows)[:, None] & (column < columns)[None, :]
    if diagonal:
        counted &= row[:, None] != column[None, :]
    place = row[:, None] * columns + column[None, :]
    tile = tl.load(values + image * rows * columns + place, mask=counted, other=-float("inf"))
    for index in range(limits):
        above = (tile > tl.load(thresholds + image * limits + index)).to(tl.int32)
        totals = counts + (image * limits + index) * patches
        in_rows = tl.sum(above, axis=1).to(tl.int64)
        tl.atomic_add(totals + first_row + row, in_rows, mask=row < rows, sem="relaxed")
        if not diagonal:
            in_columns = tl.sum(above, axis=0).to(tl.int64)
            tl.atomic_add(totals + first_column + column, in_columns, mask=column < columns, sem="relaxed")


def add_scaled(tokens: Tensor, update: Tensor, gamma: Tensor | None) -> None:
    """Add an update times a layer scale to the tokens, in place.

    Args:
        tokens: shape (T, D), float32, contiguous.
        update: shape (T, D), bfloat16 or float16: scaled and added in float32.
        gamma: shape (D,), float32, or None for 1.
    """
    rows, width = tokens.shape
    tile = _tile(width)
    with torch.cuda.device(tokens.get_device()):
        _add_scaled[(triton.cdiv(rows, tile[0]),)](tokens, update.contiguous(), gamma, rows, width, *tile)


def layer_norm(tokens: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """PyTorch's `layer_norm` of float32 tokens, rounded to a dtype in the same pass.

    Args:
        tokens: shape (T, D), float32, contiguous.
        weight: shape (D,), float32, or None for 1.
        bias: shape (D,), float32, or None for 0.
        eps: added to the variance.
        dtype: of what is returned.

    Returns:
        Shape (T, D).
    """
    rows, width = tokens.shape
    tile = _tile(width)
    normed = torch.empty_like(tokens, dtype=dtype)
    with torch.cuda.device(tokens.get_device()):
        _layer_norm[(triton.cdiv(rows, tile[0]),)](tokens, weight, bias, normed, eps, rows, width, *tile)
    return normed


def _tile(width: int) -> tuple[int, int]:
    """Rows and columns of tokens that one program takes: whole rows, in powers of two, of 4096 elements if it can."""
    columns = triton.next_power_of_2(width)
    return max(1, 4096 // columns), columns


@_kernel
def _add_scaled(  # type: ignore[no-untyped-def]
    tokens, update, gamma, rows, width: tl.constexpr, tile_rows: tl.constexpr, tile_columns: tl.constexpr
):
    first = tl.program_id(0).to(tl.int64) * tile_rows
    row, column = tl.arange(0, tile_rows)[:, None], tl.arange(0, tile_columns)[None, :]
    inside = (first + row < rows) & (column < width)
    place = first * width + row * width + column
    added = tl.load(update + place, mask=inside).to(tl.float32)
    if gamma is not None:
        added *= tl.load(gamma + column, mask=column < width)
    tl.store(tokens + place, tl.load(tokens + place, mask=inside) + added, mask=inside)


@_kernel
def _layer_norm(  # type: ignore[no-untyped-def]
    tokens, weight, bias, normed, eps, rows, width: tl.constexpr, tile_rows: tl.constexpr, tile_columns: tl.constexpr
):
    first = tl.program_id(0).to(tl.int64) * tile_rows
    row, column = tl.arange(0, tile_rows)[:, None], tl.arange(0, tile_columns)[None, :]
    inside = (first + row < rows) & (column < width)
    place = first * width + row * width + column
    values = tl.load(tokens + place, mask=inside, other=0)
    mean = tl.sum(values, axis=1) / width
    centred = tl.where(column < width, values - mean[:, None], 0)
    variance = tl.sum(centred * centred, axis=1) / width
    result = centred * tl.rsqrt(variance + eps)[:, None]
    if weight is not None:
        result *= tl.load(weight + column, mask=column < width)
    if bias is not None:
        result += tl.load(bias + column, mask=column < width)
    tl.store(normed + place, result.to(normed.dtype.element_ty), mask=inside)
