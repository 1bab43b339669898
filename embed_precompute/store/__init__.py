"""Everything that knows the bytes on disk; no other package writes the dataset.

Guarantees: a file under its final name is whole and durable, and its bytes are the ones README's
format section specifies.
Costs: importing this package imports nothing. `commit`, `records` and `index` need no torch and no
pyarrow; `shards` needs torch, `rows` pyarrow, `committed` and `manifest` both.
"""
