"""The bytes on disk. No other room writes a dataset."""
