"""Streams one text, plain and assisted; `python scripts/stream_eagle.py --help` lists the flags."""

import sys

from eagle3_mla.evaluation.streaming import main

if __name__ == "__main__":
    sys.exit(main())
