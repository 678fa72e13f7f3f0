"""`python -m prefcls_lib`: the same as the console script `prefcls`."""

import os
import sys

from prefcls_lib.cli import main

if "PREFCLS_WORKER" in os.environ:
    from prefcls_lib.pipeline.launch import end_with_parent

    end_with_parent()
sys.exit(main())
