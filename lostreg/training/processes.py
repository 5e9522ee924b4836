"""The processes of one command: one alone, or those that a launcher has started, which train together.

`accelerate launch` and `torchrun` start as many as there are GPUs, and tell each of the others in its environment. What
they tell each other goes through Hugging Face Accelerate, which one alone does not need. Imports no PyTorch by itself.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, TypeVar

from lostreg.errors import OptionError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Item = TypeVar("Item")
_PATIENCE: Final = timedelta(seconds=10)  # with the launcher


def launched() -> int:
    """How many processes a launcher has started for this command; 1 without one."""
    count = os.environ.get("WORLD_SIZE", "")
    return int(count) if "LOCAL_RANK" in os.environ and count.isdecimal() else 1


def is_main() -> bool:
    """Whether this is the process that writes and tells: the only one, or the first of those launched."""
    return launched() == 1 or os.environ.get("RANK") == "0"


def fails_first() -> bool:
    """Whether no other process of the command has failed yet, so that what all of them meet is told once."""
    if launched() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    import torch.distributed

    # The launcher's own: it is there before the processes have met, and stays as long as one of them runs.
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = torch.distributed.TCPStore(address, port, is_master=False, timeout=_PATIENCE)  # type: ignore[attr-defined]
        return store.add("lostreg/failed", 1) == 1
    except RuntimeError:  # it is gone: rather twice than never
        return True


def own_device(device: "torch.device") -> "torch.device":
    """A device as this process uses it: of several GPUs that of its own number on this machine.

    Raises:
        OptionError: if there are fewer GPUs than processes.
    """
    import torch

    if launched() == 1 or device.type != "cuda" or device.index is not None:
        return device
    processes, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if processes > gpus:
        raise OptionError(f"{processes} processes were launched on this machine, which has {gpus} GPUs: one each")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


@dataclass(frozen=True)
class Processes:
    """Those that train together, as one of them sees them. What all take part in, each must call, in the same order.

    Attributes:
        index: of this one.
        count: of all.

    Example:
        >>> Processes().total([0.5])
        [0.5]
    """

    index: int = 0
    count: int = 1
    _state: Any = None  # accelerate.PartialState

    @classmethod
    def meet(cls, device: "torch.device") -> "Processes":
        """All that a launcher has started, once each has called this.

        Args:
            device: that this one computes on, see `own_device`.

        Raises:
            OptionError: if Accelerate is not installed, or the device is not this process's own.
        """
        if launched() == 1:
            return cls()
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise OptionError(
                f"{launched()} processes were launched, which need Accelerate to share a training: "
                f'pip install "lostreg[train]" ({error})'
            ) from error
        state = PartialState(cpu=device.type == "cpu")
        if state.device.type != device.type or (device.type == "cuda" and state.device != device):
            raise OptionError(f"of several processes this one has {state.device} of its own, but is to use {device}")
        return cls(state.process_index, state.num_processes, state)

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes."""
        return self.index == 0

    def main_first(self) -> AbstractContextManager[None]:
        """A block that the others enter once the main process has left it."""
        return self._state.main_process_first() if self._state else nullcontext()

    def wait(self) -> None:
        """Go on when all are here."""
        if self._state:
            self._state.wait_for_everyone()

    def mean(self, tensor: "Tensor") -> "Tensor":
        """Of the tensors that the processes give, on their devices and of one shape."""
        if self._state is None:
            return tensor
        from accelerate.utils import reduce

        return reduce(tensor, "mean")  # type: ignore[no-any-return]

    def total(self, numbers: list[float]) -> list[float]:
        """The sum of the numbers that the processes give, number by number."""
        if self._state is None:
            return numbers
        import torch
        from accelerate.utils import reduce

        given = torch.tensor(numbers, dtype=torch.float64, device=self._state.device)
        return reduce(given, "sum").tolist()  # type: ignore[no-any-return]

    def gather(self, tensor: "Tensor") -> "Tensor":
        """The tensors of all, of one shape each, one after the other along the first dimension."""
        if self._state is None:
            return tensor
        from accelerate.utils import gather

        return gather(tensor)  # type: ignore[no-any-return]

    def gather_items(self, items: list[Item]) -> list[Item]:
        """The items of all, of whatever kind and number, one process after the other."""
        if self._state is None:
            return items
        from accelerate.utils import gather_object

        return gather_object(items)  # type: ignore[no-any-return]

    def close(self) -> None:
        """End what binds them, once nothing is left to be told."""
        if self._state:
            self._state.destroy_process_group()


ALONE: Final = Processes()
