"""Global names that compiled graphs call; one backend registers them in each rank's process."""

ALL_REDUCE = "tpserve.all_reduce"
ALL_GATHER = "tpserve.all_gather"
ALL_REDUCE_ADD_RMS_NORM = "tpserve.all_reduce_add_rms_norm"
"""Sum over ranks, plus the residual, and its RMSNorm: one call, so that a backend may make one kernel of it."""
ALL_REDUCE_ADD_RMS_NORM_FP8 = "tpserve.all_reduce_add_rms_norm_fp8"
"""The same with the normed rows quantised to e4m3, one scale each."""
