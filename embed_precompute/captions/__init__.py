"""Captions in: a parquet table, checked as a whole and read as samples.

Guarantees: see `table`; this package is the only reader of the caption files.
Costs: nothing at import but pyarrow.
"""

from embed_precompute.captions.files import InputFile
from embed_precompute.captions.table import CaptionReader, CaptionTable, Scan

__all__ = ["CaptionReader", "CaptionTable", "InputFile", "Scan"]
