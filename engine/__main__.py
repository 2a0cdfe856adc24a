"""python -m slicetune.engine COMMAND: the command `slicetune`."""

import sys

from .commands import main

if __name__ == "__main__":
    sys.exit(main())
