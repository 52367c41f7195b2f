"""``pytest bench/bench_pc_linear.py`` finds the files beside it, as ``python bench/bench_pc_linear.py`` does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
