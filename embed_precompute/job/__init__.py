"""For whoever makes a dataset: the run and everything that prepares it."""
