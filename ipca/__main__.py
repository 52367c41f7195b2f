"""``python -m ipca``, the same as the command ``ipca``."""

import sys

from ipca.cli.main import main

sys.exit(main())
