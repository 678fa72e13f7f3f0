"""`python -m prefcls_lib`: the same as the console script `prefcls`."""

import sys

from prefcls_lib.cli import main

sys.exit(main())
