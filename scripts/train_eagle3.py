"""Trains an EAGLE-3 draft head: see `training/cli.py`."""

import sys

from eagle3_mla.training.cli import main

if __name__ == "__main__":
    sys.exit(main())
