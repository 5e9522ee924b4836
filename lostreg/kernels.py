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

from lostreg.errors import LostregWarning

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
    one = torch.zeros(1, 1, 1, device=device)
    try:
        count_above(one, one[0], one.long(), 0, 0)
    except Exception as error:  # whatever compilers and drivers raise
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
