"""A GPU that is not there: tensors without data on `DEVICE`, and a count of what the GPU would be asked to do.

`FakeTensorMode` runs no kernel but checks shapes, dtypes and devices as the kernels do, so an operation that mixes
devices raises. What lostreg reads on the host (numbers, lists, NumPy arrays) is made up here, the same each time.
"""

import copy
import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lostreg.models.backbone import Backbone, place_model

DEVICE = torch.device("cuda:1")  # not the one that "cuda" means
needs_simulated_pinning = pytest.mark.skipif(
    tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 9),
    reason="older PyTorch asks CUDA's driver for memory without data, too",
)
_MODE = FakeTensorMode()  # one for all: what lostreg keeps for a device stays of use

_aten = torch.ops.aten
# Their results, or how large these are, have to be known on the host.
_ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount", "_unique2")
_ASKING += ("unique_dim", "unique_consecutive", "repeat_interleave.Tensor")
# Take memory, or another look at it, and start nothing; a view says so itself.
_FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "record_stream")


def on_gpu(backbone: Backbone, dtype: torch.dtype = torch.float32) -> Backbone:
    """A backbone whose parameters have no data and lie on `DEVICE`, in the precisions that `place_model` gives them."""
    model = copy.deepcopy(backbone.model)
    place_model(model, "cpu", dtype)
    with _MODE:
        for module in model.modules():
            for name, tensor in module._parameters.items():
                if tensor is not None:
                    module._parameters[name] = nn.Parameter(_without_data(tensor), requires_grad=False)
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else _without_data(buffer)
    return dataclasses.replace(backbone, model=model)


def _without_data(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)


class Dispatched(TorchDispatchMode):
    """Counts the operations that are dispatched while it is on, and gives those that need data something made up.

    Attributes:
        launches: by name, the operations on `DEVICE`, transfers among them. What one operation starts may be more than
            one kernel.
        waits: those that make the host wait for the GPU. A copy does unless it is asked not to, and the host's memory
            is pinned: from other memory CUDA copies after what is queued before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: list[str] = []
        self._pinned: list[Any] = []  # storages, held so that none is taken for another

    def take(self) -> tuple[int, list[str]]:
        """How many operations there were on `DEVICE`, and which of them waited, since this was asked last."""
        taken = self.launches.total(), self.waits.copy()
        self.launches.clear()
        self.waits.clear()
        return taken

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: Sequence[Any] = (), options: dict[str, Any] | None = None
    ) -> Any:
        options = options or {}
        name = str(operation).removeprefix("aten.")
        if name.startswith("prim."):  # asks a tensor for its device, and the like
            return operation(*arguments, **options)
        given = _tensors((arguments, options))
        if self._waits(name, given, arguments, options):
            self.waits.append(name)
        result = self._run(operation, name, arguments, options)
        made = _tensors(result)
        if any(tensor.device == DEVICE for tensor in (*given, *made)) and not _is_free(operation, name, arguments):
            self.launches[name] += 1
        if options.get("pin_memory") or name.startswith("_pin_memory"):
            self._pinned += [tensor.untyped_storage() for tensor in made]
        return result

    def _run(self, operation: Any, name: str, arguments: Sequence[Any], options: dict[str, Any]) -> Any:
        if name.startswith("_local_scalar_dense"):
            return _made_up(arguments[0]).item()
        if name.startswith("_pin_memory"):  # which fake tensors lack
            return arguments[0].clone()
        if name == "index.Tensor" and _mask_of(arguments):
            tensor, mask = arguments[0], _mask_of(arguments)[0]
            assert tensor.device == mask.device, f"a mask on {mask.device} of a tensor on {tensor.device}"
            return tensor.flatten(0, mask.ndim - 1)[:1].clone()
        return operation(*arguments, **options)

    def _waits(self, name: str, given: list[Tensor], arguments: Sequence[Any], options: dict[str, Any]) -> bool:
        if not given or DEVICE not in (options.get("device"), *(tensor.device for tensor in given)):
            return False
        if name.startswith(_ASKING):
            return True
        if name.startswith(("index.", "index_put", "_index_put_impl")):
            # A mask is looked at for its true places; an index or a value (`x[index] = 0`) on the host is copied.
            return bool(_mask_of(arguments)) or any(tensor.device != DEVICE for tensor in given)
        if name.startswith("copy_."):
            target, source, *rest = arguments
            on_host = target if source.device == DEVICE else source
            asked_not_to = options.get("non_blocking", rest[0] if rest else False)
            return target.device != source.device and not (asked_not_to and self._is_pinned(on_host))
        if name.startswith("_to_copy"):
            (source,) = given
            target = options.get("device") or source.device
            # What is taken on the host for a copy that is asked not to wait is pinned.
            from_pageable = source.device != DEVICE and not self._is_pinned(source)
            return target != source.device and (from_pageable or not options.get("non_blocking"))
        return False

    def _is_pinned(self, tensor: Tensor) -> bool:
        return any(tensor.untyped_storage()._cdata == storage._cdata for storage in self._pinned)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _mask_of(arguments: Sequence[Any]) -> list[Tensor]:
    """The indices that are masks."""
    return [index for index in arguments[1] if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)]


def _is_free(operation: Any, name: str, arguments: Sequence[Any]) -> bool:
    if name.partition(".")[0] in _FREE:
        return True
    if name.startswith("copy_."):  # `x[part] += y` ends with a copy of a part to itself, which PyTorch leaves out
        return _place_of(arguments[0]) == _place_of(arguments[1])
    aliases = [returned.alias_info for returned in operation._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def _place_of(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)


def _made_up(tensor: Tensor) -> np.ndarray:
    """What the host reads: ones, halves, and masks of which the first half is true."""
    assert tensor.device.type == "cpu" or not tensor.ndim, f"{tensor.device} has no NumPy arrays and no lists"
    if tensor.is_floating_point():
        return np.full(tensor.shape, 0.5, dtype=str(tensor.dtype).removeprefix("torch."))
    values = np.ones(tensor.shape, dtype=str(tensor.dtype).removeprefix("torch."))
    if tensor.dtype == torch.bool:
        values.ravel()[-(-values.size // 2) :] = False
    return values


class _Stream:
    """Stands in for streams and events: nothing runs, so there is nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = DEVICE

    def record(self, stream: Any = None) -> None:
        pass

    def record_event(self, event: Any = None) -> "_Stream":
        return self

    def wait(self, stream: Any = None) -> None:
        pass

    wait_event = wait_stream = wait

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


@contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dispatched]:
    """Everything inside runs on tensors without data; `DEVICE` is a GPU of the H100's generation."""
    attention = functional.scaled_dot_product_attention

    def fused(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """One kernel, as on a GPU; PyTorch sees none here and would write the products out."""
        if q.device != DEVICE:
            return attention(q, k, v, **options)
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        attended: Tensor = kernel(q, k, v, None, compute_log_sumexp=False, **options)[0]
        return attended

    def numpy(tensor: Tensor, **_: Any) -> np.ndarray:
        return _made_up(tensor)

    def tolist(tensor: Tensor) -> Any:
        if tensor.device == DEVICE:
            dispatched.waits.append("tolist")
        return _made_up(tensor.cpu()).tolist()

    with monkeypatch.context() as patched, _MODE, Dispatched() as dispatched:
        patched.setattr(torch.Tensor, "numpy", numpy)
        patched.setattr(torch.Tensor, "tolist", tolist)
        patched.setattr(functional, "scaled_dot_product_attention", fused)
        for name in ("Event", "Stream", "current_stream"):
            patched.setattr(torch.cuda, name, _Stream)
        patched.setattr(torch.cuda, "stream", nullcontext)
        patched.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
        patched.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        yield dispatched
