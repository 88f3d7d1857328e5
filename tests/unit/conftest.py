from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Before numpy is imported. Matrices are small here: beside another busy process, threads of OpenBLAS would wait for one
# another for milliseconds at each product, and the references take five times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# How long an example takes says more of the machine than of the code; what hangs is ended by pytest's own limit.
settings.register_profile("unit", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unit")
