"""Captions to token ids: the fast tokenizer of a checkpoint, and what it did to each caption.

Guarantees: ids are those of transformers' fast tokenizer with `truncation=True` (tested), special
tokens included, without pads; every caption cut short and every unknown token is counted. The
digest is of ids a fixed probe set gets, so it names what the tokenizer does, not its files.
Costs: loading imports transformers (a second or two); encoding releases the GIL and uses the
threads TOKENIZERS_PARALLELISM allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embed_precompute.documents import digest_of
from embed_precompute.encoders.checkpoint import quiet_transformers
from embed_precompute.errors import InputError

PROBES = (
    "",
    " ",
    "a",
    "A red fox runs through shallow water, cinematic lighting, 35mm film grain.",
    "  Two   spaces,\ttabs\nand new lines \r\n at both ends ",
    "it's they'll we've I'm \u201cquotes\u201d \u2018single\u2019 \u2014 dash \u2013 more\u2026",
    "1234567890 3.14159 24.0 FPS, 7 motion score. 50% $9.99 #1 @user a_b c/d e\\f",
    "UPPER lower MiXeD 4K HDR x264 https://example.com/a?b=c&d=e",
    "caf\u00e9 cafe\u0301 na\u00efve \u00fcber stra\u00dfe \u00c5ngstr\u00f6m \u0130stanbul "
    "\ufb01ne \u2460",
    "\ube68\uac04 \uc6b0\uc0b0\uc744 \u4e00\u53ea\u9ed1\u732b\u5728\u96ea\u5730\u91cc \u8d64\u3044"
    "\u5098\u306e\u5973\u6027 \uff21\uff22\uff23\u3000\uff11\uff12",
    "\u0440\u044b\u0436\u0430\u044f \u043b\u0438\u0441\u0430 \u03b1\u03bb\u03b5\u03c0\u03bf\u03cd "
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d\u0924\u0947 "
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\U0001f525 \U0001f469\u200d\U0001f680 \U0001f1eb\U0001f1f7 \u2764\ufe0f \U0001d54f \u2260",
    "\u200bzero\u200dwidth\ufeff \u00ad soft \u202eright to left\u202c \x07 bell \x00 nul \ue000",
    "</s> <s> <pad> <unk> <extra_id_0> <|startoftext|> <|endoftext|> [CLS] [SEP] <mask> <0x41>",
    "\u2581metaspace \u0120byte </w> ##piece antidisestablishmentarianism zzqxjkvw qqqqqqqqqqqqq",
    "A slow tracking shot follows an old fisherman along the harbour at dawn. " * 60,
)

VOCABULARIES = ("tokenizer.json", "spiece.model", "sentencepiece.bpe.model", "merges.txt")
"""Files that hold a vocabulary; the first is a fast tokenizer, from the others one is made."""
WHAT_IS_NEEDED = (
    "Expected tokenizer.json and tokenizer_config.json as transformers saves them; set the "
    "encoder's `tokenizer` when they are in another folder."
)


@dataclass(frozen=True)
class Tokenized:
    """What the tokenizer made of some captions, in their order."""

    ids: list[NDArray[np.int32]]
    """[tokens] each: at most max_length ids, special tokens included, no pads."""
    truncated: list[bool]
    """Whether the caption had more tokens than max_length."""
    num_tokens: list[int]
    """Tokens kept: the length of `ids`."""
    num_unknown: list[int]
    """Unknown tokens among those kept."""


class CaptionTokenizer:
    """A checkpoint's fast tokenizer, cutting captions at `max_length` tokens."""

    pad_id: int
    eos_id: int
    max_id: int
    """Highest id of the vocabulary, added tokens included."""
    filler: NDArray[np.int32]
    """[tokens] ids of the empty caption."""
    special_ids: frozenset[int]
    """Ids that stand for no text: pad, end, unknown, and the tokens added to the vocabulary."""
    digest: str
    """sha256 of the ids of a fixed probe set, whole and truncated."""

    def __init__(self, where: str, folder: Path, max_length: int) -> None:
        """`where` is the config field errors name. Raises InputError: no usable fast tokenizer."""
        tokenizer = load_tokenizer(where, folder)
        self.max_length = max_length
        self.eos_id = int(tokenizer.eos_token_id)
        self.pad_id = int(tokenizer.pad_token_id)
        self._unk_id: int | None = tokenizer.unk_token_id
        self._direction = str(tokenizer.truncation_side)
        # The Rust tokenizer behind transformers' object, which is dropped here: its __call__ would
        # set truncation and padding again.
        self._backend = tokenizer.backend_tokenizer
        self._backend.encode_special_tokens = bool(tokenizer.split_special_tokens)
        self._backend.no_padding()
        self._backend.no_truncation()
        self.max_id = max(self._backend.get_vocab(with_added_tokens=True).values())
        self.filler = self._encode([""])[0]
        added = self._backend.get_added_tokens_decoder()
        named = [self.eos_id, self.pad_id, self._unk_id, *self.filler.tolist()]
        self.special_ids = frozenset({*added, *(token for token in named if token is not None)})
        self._unknown_in_filler = int((self.filler == self._unk_id).sum())
        if max_length < len(self.filler):
            raise InputError(
                f"{where}: max_length {max_length} leaves no room: the empty caption alone has "
                f"{len(self.filler)} special tokens. Raise max_length."
            )
        self.digest = self._probe()
        self._truncate(max_length)

    def encode(self, texts: Sequence[str]) -> Tokenized:
        """Tokenise captions; safe to call from several threads."""
        encodings = self._backend.encode_batch_fast(list(texts)) if texts else []
        ids = [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]
        return Tokenized(
            ids=ids,
            truncated=[bool(encoding.overflowing) for encoding in encodings],
            num_tokens=[len(tokens) for tokens in ids],
            num_unknown=[self._count_unknown(tokens) for tokens in ids],
        )

    def _count_unknown(self, tokens: NDArray[np.int32]) -> int:
        # CLIP's unknown token is its end token, which every caption has: what the empty caption has
        # of it is not unknown.
        return int((tokens == self._unk_id).sum()) - self._unknown_in_filler

    def _encode(self, texts: list[str]) -> list[NDArray[np.int32]]:
        return [np.asarray(e.ids, dtype=np.int32) for e in self._backend.encode_batch_fast(texts)]

    def _truncate(self, max_length: int) -> None:
        self._backend.enable_truncation(max_length, direction=self._direction)

    def _probe(self) -> str:
        """Digest of the probes' ids, whole, and cut at a fixed length (max_length is not in it)."""
        whole = self._encode(list(PROBES))
        self._truncate(len(self.filler) + 7)
        cut = self._encode(list(PROBES))
        return digest_of({"whole": [i.tolist() for i in whole], "cut": [i.tolist() for i in cut]})


def load_tokenizer(where: str, folder: Path) -> Any:
    """transformers' fast tokenizer of a folder. Raises InputError: none there, or an unfit one."""
    tokenizer = _load(where, folder)
    _check(where, folder, tokenizer)
    return tokenizer


def _load(where: str, folder: Path) -> Any:
    from transformers import AutoTokenizer

    with quiet_transformers():
        try:
            return AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # the Rust side raises plain Exception for a damaged file
            reason = " ".join(str(error).split())[:300]
            advice = WHAT_IS_NEEDED
            if any(folder.glob("*.model")) and find_spec("sentencepiece") is None:
                # transformers asks for tiktoken then, which would not help.
                advice = "Its SentencePiece model needs `pip install sentencepiece protobuf`."
            raise InputError(
                f"{where}: {folder} gives no tokenizer ({type(error).__name__}: {reason}). {advice}"
            ) from error


def _check(where: str, folder: Path, tokenizer: Any) -> None:
    """Refuse what would give other ids, or pads elsewhere, than this program promises."""
    if not tokenizer.is_fast:
        raise InputError(
            f"{where}: {folder} has only a slow tokenizer ({type(tokenizer).__name__}), whose ids "
            "differ from the fast one's. Save a fast one (tokenizer.json) beside it."
        )
    if not any((folder / name).is_file() for name in VOCABULARIES):
        # transformers 5 makes an empty tokenizer then, for which every word is unknown.
        raise InputError(f"{where}: {folder} gives no tokenizer. {WHAT_IS_NEEDED}")
    for name in ("eos_token", "pad_token"):
        if getattr(tokenizer, f"{name}_id") is None:
            raise InputError(
                f"{where}: the tokenizer in {folder} has no {name}. Set it in "
                "tokenizer_config.json as the checkpoint's authors did."
            )
    if tokenizer.padding_side != "right":
        raise InputError(
            f"{where}: the tokenizer in {folder} pads on the {tokenizer.padding_side}: text "
            "encoders are padded on the right. Set padding_side in tokenizer_config.json."
        )
