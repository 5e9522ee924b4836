"""Which errors say that memory ran out: by class, or by the words of the library that raised them."""

import pytest
import torch

from lostreg.errors import ImageUnavailableError, is_out_of_memory

# As PyTorch puts them, down to where the numbers begin.
TOLD = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9",
    "[enforce fail at alloc_cpu.cpp:115] data. DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",
    "unable to mmap 9 bytes from file <model.pth>: Cannot allocate memory (12)",
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "HIP out of memory. Tried to allocate 2.00 GiB.",
    "HIP error: out of memory",
    "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`",
    "rocBLAS error: rocblas_status_memory_error",
    "MPS backend out of memory (MPS allocated: 8.83 GB, other allocations: 184.00 KB, max allowed: 9.07 GB).",
    "Invalid buffer size: 20.00 GiB",
)


@pytest.mark.parametrize("message", TOLD)
def test_words_of_a_lack_of_memory_are_known(message: str) -> None:
    assert is_out_of_memory(RuntimeError(message))
    if hasattr(torch, "AcceleratorError"):  # since PyTorch 2.8, for what CUDA and HIP report
        assert issubclass(torch.AcceleratorError, RuntimeError)
    assert not is_out_of_memory(ValueError(message))


def test_errors_that_mean_nothing_else_are_known_without_words() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("9 GiB"))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
        ImageUnavailableError("dog.jpg: out of memory on one image of 8x11 patches on cpu"),
    ],
)
def test_other_errors_are_not(error: Exception) -> None:
    assert not is_out_of_memory(error)
