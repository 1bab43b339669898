"""What a damaged or forged parquet file would decode to, known before it is decoded.

Guarantees: whatever the bytes, an answer or `ParquetDamage`; pyarrow decodes the files themselves.
Costs: see `chunks` (the footer) and `pages` (the page headers).
"""
