"""Stores a target's features for training without it: see `training/feature_preparation.py`."""

from eagle3_mla.training.feature_preparation import main

if __name__ == "__main__":
    main()
