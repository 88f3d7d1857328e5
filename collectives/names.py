"""Global names that compiled graphs call; one backend registers them in each rank's process."""

ALL_REDUCE = "tpserve.all_reduce"
ALL_GATHER = "tpserve.all_gather"
"""Columns of the ranks side by side: float32, and on GPUs bfloat16 too."""
WHOLE_ROWS = "tpserve.whole_rows"
"""Of GPUs: (T, H), a sum that one of the two below gave, whole in some of its T rows on each rank -> whole in all."""
GEMM_ALL_REDUCE_ADD_RMS_NORM = "tpserve.gemm_all_reduce_add_rms_norm"
"""A GEMM, its sum over ranks, plus the residual, and the RMSNorm of that: one call, so that a backend may overlap them.

Takes the name of the GEMM in the kernel library and its arguments but for the output, then the residual, the norm's
weight and epsilon; gives (T, H) as scratch memory, the sum and its norm. No output may share memory with an input: what
it writes of the one may come before it has read all of the other.
"""
GEMM_ALL_REDUCE_ADD_RMS_NORM_FP8 = "tpserve.gemm_all_reduce_add_rms_norm_fp8"
"""The same with the normed rows quantised to e4m3, one scale each, which comes as one more output."""
