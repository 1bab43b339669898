"""opensora/datasets."""
