"""Our own layers of T5, CLIP and decoder-only models."""
