"""`python -m ctrsink` is the command line."""

import sys

from ctrsink.cli import main

if __name__ == "__main__":
    sys.exit(main())
