"""Our own layers of T5 and CLIP."""
