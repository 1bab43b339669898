"""Frozen text encoders: from a configuration and captions to embeddings."""
