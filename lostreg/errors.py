"""Errors that a user can mend: each message says what was expected and what came.

The command line prints the message of any `LostregError` as one line and exits with code 2.
"""

import re
from typing import Final


class LostregError(Exception):
    """Base of every error that lostreg raises about its input."""


class OptionError(LostregError, ValueError):
    """An option or argument is outside its range, or two of them contradict each other."""


class BackboneError(LostregError):
    """The backbone is unknown, unsupported, or its weights cannot be had."""


class WeightsError(BackboneError):
    """A weights file cannot be read or does not fit the backbone."""


class ImageError(LostregError):
    """An image file cannot be read, or is larger than allowed."""


class ImageUnavailableError(ImageError):
    """An image could not be had this time: its file was not there or could not be opened, or memory ran out.

    Nothing is said of its pixels: another try may read it.
    """


class DatasetError(LostregError):
    """A benchmark's folder or annotations are missing, incomplete or malformed."""


class PredictionsError(LostregError):
    """A predictions file or output folder cannot be used."""


class CalibrationError(LostregError):
    """A bias file cannot be written or read, or nothing could be calibrated."""


class ObjectnessError(LostregError):
    """An objectness cannot be learned, read or written."""


class RegistersError(LostregError):
    """A registers file cannot be written or read, or there is nothing that test-time registers could take up."""


class RecipeError(LostregError):
    """A recipe is unknown, cannot be read, or says what no command takes."""


class TrainingError(LostregError):
    """Nothing can be trained on these images, or what a training keeps on a disk is damaged."""


class ClusterError(LostregError):
    """Ray cannot be started or joined, or its workers do not last."""


class LostregWarning(UserWarning):
    """Something that a user should know of, though the work goes on."""


# What PyTorch, its allocators (CPU, CUDA, HIP, MPS) and the libraries below them say where they raise a plain
# RuntimeError.
_OUT_OF_MEMORY: Final = re.compile(
    r"out of memory|outofmemory|(can't|cannot|could not) allocate memory|not enough memory|_alloc(ation)?_failed"
    r"|rocblas_status_memory_error|invalid buffer size",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, the host's or a device's.

    PyTorch has a class for it that only some of its allocators raise; of the others there are only the words.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None
