"""`python -m router_tuning`, which is also what `accelerate launch -m router_tuning` runs."""

import sys

from .cli import main

sys.exit(main())
