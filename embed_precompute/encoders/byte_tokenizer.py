"""ByT5's tokenizer: an id for every byte of a text. transformers has only a slow one.

Guarantees: the ids of transformers' `ByT5Tokenizer` with `truncation=True`, special tokens in the
text included.
Costs: a few microseconds per caption. It has the interface of a `tokenizers.Tokenizer`, as far as
`CaptionTokenizer` uses it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ByteEncoding:
    """The ids of one text."""

    ids: list[int]
    overflowing: bool
    """Whether some were cut off."""


class ByteTokenizer:
    """The ids of a `ByT5Tokenizer`, without it."""

    encode_special_tokens = False
    """True: the text of a special token is encoded as any other text."""

    def __init__(self, slow: Any) -> None:
        """`slow`: transformers' tokenizer; its special tokens and their ids are taken over."""
        self._special = {
            token.content: (id, token) for id, token in slow.added_tokens_decoder.items()
        }
        longest_first = sorted(self._special, key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._offset, self._end_id = int(slow.offset), int(slow.eos_token_id)
        self._max_length: int | None = None
        self._cut_at_end = True

    def no_padding(self) -> None:
        """There is none."""

    def no_truncation(self) -> None:
        self._max_length = None

    def enable_truncation(self, max_length: int, *, direction: str) -> None:
        self._max_length, self._cut_at_end = max_length, direction == "right"

    def get_vocab(self, *, with_added_tokens: bool) -> dict[str, int]:
        """Bytes are named <0x00> to <0xFF>."""
        found = {f"<0x{byte:02X}>": self._offset + byte for byte in range(256)}
        return found | {content: id for content, (id, _) in self._special.items()}

    def to_str(self) -> str:
        return json.dumps({"model": {"vocab": self.get_vocab(with_added_tokens=True)}})

    def encode_batch_fast(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[ByteEncoding]:
        """T5 wants its end token: it is always added."""
        assert add_special_tokens
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> ByteEncoding:
        ids: list[int] = []
        for part in self._parts(text):
            if part in self._special and not self.encode_special_tokens:
                ids.append(self._special[part][0])
            else:
                raw = np.frombuffer(part.encode(), np.uint8).astype(np.int64)
                ids += (raw + self._offset).tolist()
        whole = len(ids) + (ids[-1:] != [self._end_id])
        if self._max_length is not None and len(ids) >= self._max_length:
            kept = self._max_length - 1
            ids = ids[:kept] if self._cut_at_end else ids[len(ids) - kept :]
        if ids[-1:] != [self._end_id]:  # a text may bring its own end
            ids.append(self._end_id)
        return ByteEncoding(ids, self._max_length is not None and whole > self._max_length)

    def _parts(self, text: str) -> list[str]:
        """Special tokens, and the text between them, less the white space that they take."""
        if self.encode_special_tokens:
            return [text]
        parts = self._pattern.split(text)  # text at even places, special tokens at odd ones
        for at in range(1, len(parts), 2):
            token = self._special[parts[at]][1]
            if token.lstrip:
                parts[at - 1] = parts[at - 1].rstrip()
            if token.rstrip:
                parts[at + 1] = parts[at + 1].lstrip()
        return parts
