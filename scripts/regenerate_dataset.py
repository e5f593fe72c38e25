"""Answers the prompts of a dataset with the target itself: see `training/regeneration.py`."""

from eagle3_mla.training.regeneration_cli import main

if __name__ == "__main__":
    main()
