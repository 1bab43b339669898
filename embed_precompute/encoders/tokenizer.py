"""Captions to token ids: the fast tokenizer of a checkpoint, and what it did to each caption.

The ids are those of transformers' fast tokenizer with `truncation=True`, special tokens included,
without pads. Where a template stands around the captions, its tokens are found by tokenising it.
The digest is of the ids that a fixed probe set gets: it names what the tokenizer does, not its
files.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from embed_precompute.documents import digest_of
from embed_precompute.encoders.checkpoint import quiet_transformers
from embed_precompute.errors import InputError

T = TypeVar("T")

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


BEGINNINGS = ("a", "Red", "7", '"', "\u00e9", "\ube68", "\U0001f525", "(", "THE", "zq")
"""Captions that share no first token: what their ids have in common is the template's."""


@dataclass(frozen=True)
class Tokenized:
    """What the tokenizer made of some captions: a column each, in the captions' order."""

    ids: list[NDArray[np.int32]]
    """[num_ids] each: what the encoder is run on, template and special tokens included, no pads."""
    num_ids: list[int]
    first: list[int]
    """The first position whose embedding is stored, where only real positions are."""
    stored: list[int]
    """How many positions are stored from there."""
    tokens: list[int]
    """The caption's own tokens: without the template's, with the tokenizer's special tokens."""
    truncated: list[bool]
    """Whether the caption had more tokens than max_length."""
    unknown: list[int]
    """Unknown tokens among those kept."""

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: Sequence[int]) -> Tokenized:
        """The captions at `rows`, in that order."""

        def chosen(column: list[T]) -> list[T]:
            return [column[row] for row in rows]

        return Tokenized(
            chosen(self.ids),
            chosen(self.num_ids),
            chosen(self.first),
            chosen(self.stored),
            chosen(self.tokens),
            chosen(self.truncated),
            chosen(self.unknown),
        )


@dataclass(frozen=True)
class Template:
    """Text around every caption, and which positions of the whole are not stored."""

    before: str = ""
    after: str = ""
    crop_start: int | Literal["template"] = 0
    """Positions left out at the start; `template`: all that stand before the caption."""
    crop_end: int = 0
    """Positions left out at the end."""

    @classmethod
    def parse(cls, text: str, crop_start: int | Literal["template"], crop_end: int) -> Template:
        """`text` is a format string with {text} in it. Raises InputError."""
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise InputError(f"template {text!r} is not a format string: {error}.") from None
        fields = [number for number, part in enumerate(parts) if part[1] is not None]
        if len(fields) != 1 or parts[fields[0]][1:] != ("text", "", None):
            raise InputError(
                f"template {text!r}: expected {{text}} in it once, and no other field. "
                "Write {{ and }} for braces."
            )
        literals = [part[0] for part in parts]
        split = fields[0] + 1
        return cls("".join(literals[:split]), "".join(literals[split:]), crop_start, crop_end)

    def around(self, text: str) -> str:
        return f"{self.before}{text}{self.after}"


class CaptionTokenizer:
    """A checkpoint's fast tokenizer, cutting captions at `max_length` tokens."""

    name: str
    """Its class in transformers."""
    longest: int
    """Tokens of the longest caption: max_length, and what is cropped before it."""
    pad_id: int | None
    """None where no pad is ever attended."""
    eos_id: int | None
    max_id: int
    """Highest id of the vocabulary, added tokens included."""
    empty: Tokenized
    """The empty caption."""
    digest: str
    """sha256 of the ids of a fixed probe set, whole and truncated."""

    def __init__(
        self,
        where: str,
        folder: Path,
        max_length: int,
        special_tokens: Sequence[str],
        template: Template | None = None,
    ) -> None:
        """`where` is the config field errors name; `special_tokens` as in `load_tokenizer`.

        Raises InputError: no usable fast tokenizer, or one that the template does not fit.
        """
        tokenizer = load_tokenizer(where, folder, special_tokens)
        self.name = type(tokenizer).__name__
        self.eos_id, self._unk_id = tokenizer.eos_token_id, tokenizer.unk_token_id
        self.pad_id = tokenizer.pad_token_id if "pad_token" in special_tokens else None
        # The Rust tokenizer behind transformers' object, which is dropped: its __call__ would
        # set truncation and padding again.
        self._backend = tokenizer.backend_tokenizer
        self._backend.encode_special_tokens = bool(tokenizer.split_special_tokens)
        self._backend.no_padding()
        self._backend.no_truncation()
        self.max_id = max(self._backend.get_vocab(with_added_tokens=True).values())
        direction = str(tokenizer.truncation_side)
        self._template = template or Template()
        self.digest = self._probe(direction)
        self._num_before, self._num_after = self._template_tokens(where)
        crop_start = self._template.crop_start
        self._first = self._num_before if crop_start == "template" else crop_start
        self._unknown_in_empty = 0
        self.empty = self.encode([""])
        self._unknown_in_empty, self.empty.unknown[0] = self.empty.unknown[0], 0
        self.longest = self._first + max_length
        if self.longest < self.empty.num_ids[0]:
            raise InputError(
                f"{where}: max_length {max_length} leaves no room: the empty caption alone has "
                f"{self.empty.num_ids[0] - self._first} special tokens. Raise max_length."
            )
        if self.empty.stored[0] < 1:
            raise InputError(
                f"{where}: the empty caption has no token to store, and every dataset holds its "
                "embedding. Give a template with text after {text}, or crop less."
            )
        self._backend.enable_truncation(self.longest, direction=direction)

    def encode(self, texts: Sequence[str]) -> Tokenized:
        """Tokenise captions; safe to call from several threads."""
        whole = [self._template.around(text) for text in texts]
        encodings = self._backend.encode_batch_fast(whole) if whole else []
        ids = [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]
        num_ids = [len(each) for each in ids]
        truncated = [bool(encoding.overflowing) for encoding in encodings]
        # What is cut is the end, and with it the template's text after the caption.
        others = [self._num_before + (0 if cut else self._num_after) for cut in truncated]
        cropped = self._first + self._template.crop_end
        return Tokenized(
            ids=ids,
            num_ids=num_ids,
            first=[self._first] * len(ids),
            stored=[max(0, count - cropped) for count in num_ids],
            tokens=[max(0, count - other) for count, other in zip(num_ids, others, strict=True)],
            truncated=truncated,
            unknown=[self._count_unknown(each) for each in ids],
        )

    def _count_unknown(self, ids: NDArray[np.int32]) -> int:
        # CLIP's unknown token is its end token, which every caption has: what the empty caption has
        # of it is not unknown.
        return int((ids == self._unk_id).sum()) - self._unknown_in_empty

    def _encode(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        whole = [self._template.around(text) for text in texts]
        encodings = self._backend.encode_batch_fast(whole)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _probe(self, direction: str) -> str:
        """Digest of the probes' ids, whole, and cut at a fixed length (max_length is not in it)."""
        empty, *whole = self._encode(["", *PROBES])
        self._backend.enable_truncation(len(empty) + 7, direction=direction)
        cut = self._encode(PROBES)
        self._backend.no_truncation()
        return digest_of({"whole": [i.tolist() for i in whole], "cut": [i.tolist() for i in cut]})

    def _template_tokens(self, where: str) -> tuple[int, int]:
        """The template's tokens before a caption and after it.

        Raises InputError where captions change those before, so that no position divides the two,
        and where crop_start is another number.
        """
        template = self._template
        probes = self._encode(BEGINNINGS)
        # Without a template, special tokens that the tokenizer adds count as the caption's own.
        before = _num_common(probes) if template.before else 0
        after = (
            _num_common([ids[::-1] for ids in probes]) if template.before + template.after else 0
        )
        if template.before:
            alone = self._backend.encode(template.before)
            added_at_end = alone.special_tokens_mask[::-1].index(0)
            if alone.ids[: len(alone.ids) - added_at_end] != probes[0][:before].tolist():
                raise InputError(
                    f"{where}: the last token of the template's text before the caption "
                    f"({template.before[-20:]!r}) changes with the caption that follows, so no "
                    "position divides the two. End it with a special token or a line break."
                )
        if template.crop_start not in ("template", 0, before):
            raise InputError(
                f"{where}: crop_start is {template.crop_start}, and with this tokenizer the "
                f"template has {before} tokens before the caption. Give that number, 0 or template."
            )
        return before, after


def _num_common(rows: Sequence[NDArray[np.int32]]) -> int:
    """How many ids at their beginning all rows have in common."""
    shortest = min(map(len, rows))
    same = (np.stack([row[:shortest] for row in rows]) == rows[0][:shortest]).all(0)
    return shortest if same.all() else int(np.argmin(same))


def load_tokenizer(where: str, folder: Path, special_tokens: Sequence[str]) -> Any:
    """transformers' fast tokenizer of a folder, which has these special tokens (`pad_token`, say).

    Raises InputError: none there, or an unfit one.
    """
    tokenizer = _load(where, folder)
    _check(where, folder, tokenizer, special_tokens)
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


def _check(where: str, folder: Path, tokenizer: Any, special_tokens: Sequence[str]) -> None:
    """Refuse what would give other ids, or pads elsewhere, than this program promises."""
    if not tokenizer.is_fast:
        raise InputError(
            f"{where}: {folder} has only a slow tokenizer ({type(tokenizer).__name__}), whose ids "
            "differ from the fast one's. Save a fast one (tokenizer.json) in the same folder."
        )
    if not any((folder / name).is_file() for name in VOCABULARIES):
        # transformers 5 makes an empty tokenizer then, for which every word is unknown.
        raise InputError(f"{where}: {folder} gives no tokenizer. {WHAT_IS_NEEDED}")
    for name in special_tokens:
        if getattr(tokenizer, f"{name}_id") is None:
            raise InputError(
                f"{where}: the tokenizer in {folder} has no {name}. Set it in "
                "tokenizer_config.json as the checkpoint's authors did."
            )
    if "pad_token" in special_tokens and tokenizer.padding_side != "right":
        raise InputError(
            f"{where}: the tokenizer in {folder} pads on the {tokenizer.padding_side}: text "
            "encoders are padded on the right. Set padding_side in tokenizer_config.json."
        )
