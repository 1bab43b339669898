"""The bytes of a dataset on disk. Only modules of this folder write them."""
