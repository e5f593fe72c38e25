"""Evaluates a draft head; `python scripts/eval_eagle.py --help` lists the flags."""

import sys

from eagle3_mla.evaluation.cli import main

if __name__ == "__main__":
    sys.exit(main())
