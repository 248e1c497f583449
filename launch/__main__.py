"""`python -m launch` is the `unmask` command."""

import sys

from launch.cli import main

sys.exit(main())
