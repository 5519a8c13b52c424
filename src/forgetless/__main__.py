"""`python -m forgetless`, and `accelerate launch -m forgetless`."""

import sys

from forgetless.cli import main

sys.exit(main())
