"""Errors of the compile side; each message names the value and the remedy.

CompileError
├── ModelConfigError      config.json cannot be served
├── CheckpointError       weights or tokenizer are missing, corrupt or of an unknown kind
├── CacheError            the artifact cache cannot give or take an artifact under its policy
├── NativeBuildError      native.py: the host's C++ compiler is missing or refused the kernels
└── CudaBuildError        native_cuda.py: nvcc is missing or refused the kernels
"""


class CompileError(ValueError):
    """Something asked of the compiler cannot be done."""


class ModelConfigError(CompileError):
    """The model's config.json asks for something that is missing here."""


class CheckpointError(CompileError):
    """A checkpoint file is missing, corrupt or of an unknown kind."""


class CacheError(CompileError):
    """The cache policy forbids what is needed."""
