from __future__ import annotations

import os

# Before numpy is imported. Matrices are small here: beside another busy process, threads of OpenBLAS would wait for one
# another for milliseconds at each product, and the references take five times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
