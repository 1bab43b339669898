"""For whoever inspects a dataset: verify, repair, status, info."""
