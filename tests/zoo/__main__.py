"""Entry point of ``python -m tests.zoo``."""

import os
import sys

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE"):
    os.environ[variable] = "1"  # before torch is imported

from tests.zoo.driver import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
