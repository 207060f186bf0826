"""Exceptions of torch and its libraries when memory runs out or a device fails, with their real texts."""

import torch

_CUDA_ADVICE = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1"
)

EXHAUSTED = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.79 GiB"),
    torch.OutOfMemoryError("XPU out of memory. Tried to allocate 512.00 MiB. GPU 0 has a total capacity of 16.50 GiB."),
    torch.AcceleratorError(f"CUDA error: out of memory{_CUDA_ADVICE}"),
    RuntimeError(f"CUDA error: out of memory{_CUDA_ADVICE}"),
    torch.AcceleratorError("HIP error: out of memory"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
    RuntimeError(
        "MPS backend out of memory (MPS allocated: 7.64 GiB, other allocations: 68.91 GiB, max allowed: 88.13 GiB). "
        "Tried to allocate 33.92 GiB on private pool."
    ),
    RuntimeError("Invalid buffer size: 37.25 GiB"),
    RuntimeError("UR backend failed. UR backend returns:40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)"),
    RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    RuntimeError(
        "Native API failed. Native API returns: -5 (PI_ERROR_OUT_OF_RESOURCES) -5 (PI_ERROR_OUT_OF_RESOURCES)"
    ),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 40000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    MemoryError(),
)
"""Memory of the device or of the host ran out."""

FAILED = (
    torch.AcceleratorError(f"CUDA error: an illegal memory access was encountered{_CUDA_ADVICE}"),
    torch.AcceleratorError(f"CUDA error: device-side assert triggered{_CUDA_ADVICE}"),
    torch.AcceleratorError(f"CUDA error: unspecified launch failure{_CUDA_ADVICE}"),
    torch.AcceleratorError(f"CUDA error: the launch timed out and was terminated{_CUDA_ADVICE}"),
    RuntimeError("Native API failed. Native API returns: 20 (UR_RESULT_ERROR_DEVICE_LOST)"),
)
"""The device failed: no later call succeeds."""

OTHER = (
    RuntimeError("The size of tensor a (4) must match the size of tensor b (8) at non-singleton dimension 1"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm(handle)`"),
    RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376. Reducing block sizes"),
    ValueError("The prompt 'CUDA out of memory' has too many tokens."),
    KeyError("DefaultCPUAllocator"),
)
"""Neither."""
