"""For whoever trains on a dataset: data set, loader, model inputs."""
