"""Products in float32, whatever precision the caller lets them fall to: signs of similarities decide the boxes.

PyTorch keeps that precision for the whole process: TF32 on GPUs, bfloat16 on CPUs that multiply it (with "medium" every
large product on a CPU goes to oneDNN, which rounds otherwise even where it stays in float32). One setting is told
through several names, of which old ones raise an error where new ones contradict them. So it is changed only where it
matters, for as long as anyone needs it, and in all its forms at once. On a GPU it acts when a product is launched.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

_BACKENDS: Final = ("cuda", "mkldnn")
_REDUCED: Final = ("tf32", "bf16")
# `fp32_precision`, since PyTorch 2.9, for all, for a backend and for an operation, "none" where the one above holds.
# Not through torch.backends: what `mkldnn.fp32_precision` is set to is set for all backends there.
_precision: Final[Callable[[str, str], str] | None] = getattr(torch._C, "_get_fp32_precision_getter", None)
_set_precision: Final[Callable[[str, str, str], Any]] = getattr(torch._C, "_set_fp32_precision_setter", lambda *_: None)


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Products in float32 while this is entered, in any number of threads; in this one without autocast, too.

    The last one to leave restores what the first one met.

    Args:
        device: where the products are taken.
    """
    _exact.enter()
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        _exact.leave()


class _Exact:
    """The process's setting, and how many are in need of float32."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._restore: Callable[[], None] | None = None

    def enter(self) -> None:
        """From now on products are exact."""
        with self._lock:
            if not self._users and _is_reduced():
                self._restore = _set_exact()
            self._users += 1

    def leave(self) -> None:
        """The last one restores the setting."""
        with self._lock:
            self._users -= 1
            if not self._users and self._restore is not None:
                self._restore()
                self._restore = None


_exact: Final = _Exact()


def _is_reduced() -> bool:
    """Whether products of float32 may be taken in less."""
    if _precision is None:
        return torch.get_float32_matmul_precision() != "highest"
    return any(_precision(backend, "matmul") in _REDUCED for backend in _BACKENDS)


def _set_exact() -> Callable[[], None]:
    """Have products taken in float32; what restores the precision they had."""
    own = {backend: _take_own(backend, _precision) for backend in _BACKENDS} if _precision else {}
    old_name = torch.get_float32_matmul_precision()  # raises no error now that the new names say "ieee"
    torch.set_float32_matmul_precision("highest")

    def restore() -> None:
        torch.set_float32_matmul_precision(old_name)  # sets the new names, too
        for backend, precision in own.items():
            _set_precision(backend, "matmul", precision)

    return restore


def _take_own(backend: str, precision_of: Callable[[str, str], str]) -> str:
    """Set a backend's products to float32; what they were set to themselves, "none" where they inherited it."""
    above = {}
    for level in (("generic", "all"), (backend, "all")):
        above[level] = precision_of(*level)
        _set_precision(*level, "none")  # so that what is inherited shows as "none" below
    own = precision_of(backend, "matmul")
    _set_precision(backend, "matmul", "ieee")
    for level, precision in above.items():
        _set_precision(*level, precision)
    return own
