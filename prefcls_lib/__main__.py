"""`prefcls` and `python -m prefcls_lib`."""

import sys

try:
    from prefcls_lib.cli import main
except KeyboardInterrupt:  # Ctrl-C while Python imports
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
