"""Entry point of a Ray job.

`ray job submit --working-dir . -- python launchers/train.py --config FILE [section.key=value ...]`
"""

import sys
from pathlib import Path

# A Ray job runs this file from the folder it was sent; the package lies beside `launchers/`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ctrsink.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
