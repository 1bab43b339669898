"""Our encoders next to transformers', on this machine."""
