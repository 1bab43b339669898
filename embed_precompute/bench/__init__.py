"""Our encoders beside transformers, on this machine."""
