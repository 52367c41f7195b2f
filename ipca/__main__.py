"""``python -m ipca``, the same as the command ``ipca``."""

import sys

from ipca.cli import main

sys.exit(main())
