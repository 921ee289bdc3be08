"""`python -m pipelines COMMAND …`: the command `prefarena` where the package is not installed."""

from __future__ import annotations

import sys

from pipelines.cli import main

sys.exit(main())
