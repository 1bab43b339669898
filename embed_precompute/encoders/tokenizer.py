"""Captions to token ids by a checkpoint's fast tokenizer, and token ids to batches of fixed shapes.

The ids are those of transformers' fast tokenizer with `truncation=True`, special tokens included,
without pads. If there is a template around the captions, its tokens are found by tokenising it.
Before that the encoder's own text steps are applied.

Every batch has one of a few shapes, and a caption's shape follows from its own number of tokens. So
the shape of a caption's forward never depends on its neighbours, which is what makes an embedding
bitwise a function of the caption. The last batch of a shape is filled up with the empty caption,
whose embeddings are thrown away.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from embed_precompute.documents import digest_of
from embed_precompute.encoders.byte_tokenizer import ByteTokenizer
from embed_precompute.encoders.checkpoint import quiet_transformers
from embed_precompute.encoders.text_steps import Empty, Step, make_cleaner
from embed_precompute.errors import InputError, InternalError, one_line, require

T = TypeVar("T")
Shape = tuple[int, int]
"""(B, L): number of captions of one forward, and of tokens of each."""

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

BYTES = "ByT5Tokenizer"
"""transformers has no fast one of it; `ByteTokenizer` gives its ids. It has no vocabulary file."""
SPECIAL = re.compile(r"<\|[^<>|\s]+\|>|<(?:start|end)_of_turn>|\[/?INST\]")
"""What special tokens of chat models look like."""
VOCABULARIES = ("tokenizer.json", "spiece.model", "sentencepiece.bpe.model", "merges.txt")
"""Files that hold a vocabulary. The first is a fast tokenizer; others are converted to one."""
WHAT_IS_NEEDED = (
    "Expected tokenizer.json and tokenizer_config.json as transformers saves them; set the "
    "encoder's `tokenizer` when they are in another folder."
)
TEMPLATE_CROP = re.compile(r"template(?:-(\d{1,6}))?")
BEGINNINGS = ("a", "Red", "7", '"', "\u00e9", "\ube68", "\U0001f525", "(", "THE", "zq")
"""Captions that share no first token: what their ids have in common is the template's."""


@dataclass(frozen=True)
class Tokenized:
    """Some captions, tokenised. Each field is a list with one entry per caption, in their order."""

    ids: list[NDArray[np.int32]]
    """[num_ids] each: what the encoder is run on, template and special tokens included, no pads."""
    num_ids: list[int]
    first: list[int]
    """The first position that is stored, apart from `keep_first` at the very start."""
    stored: list[int]
    """How many positions are stored, if not all are: `keep_first`, and the others from `first` on;
    the last may be a pad's."""
    tokens: list[int]
    """Number of the caption's own tokens: without the template's, with special tokens. If the end
    is cut off, tokens of the template that are left after the caption are counted too."""
    truncated: list[bool]
    """Whether the caption in its template had more tokens than `CaptionTokenizer.longest`."""
    unknown: list[int]
    """Number of unknown tokens among those kept."""
    pads: list[int]
    """Number of pads behind the tokens that are stored with them."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def extents(self) -> list[int]:
        """How many positions each caption takes in a forward: its tokens, and pads to store."""
        return [ids + pads for ids, pads in zip(self.num_ids, self.pads, strict=True)]

    def select(self, rows: Sequence[int]) -> Tokenized:
        """The captions at `rows`, in that order."""

        def chosen(column: list[T]) -> list[T]:
            return [column[row] for row in rows]

        return Tokenized(*(chosen(getattr(self, column.name)) for column in fields(self)))

    def without_first(self, count: int) -> Tokenized:
        """The captions without their first `count` ids, of which none is stored."""
        return replace(
            self,
            ids=[ids[count:] for ids in self.ids],
            num_ids=[max(0, num_ids - count) for num_ids in self.num_ids],  # 0: nothing is encoded
            first=[first - count for first in self.first],
        )


@dataclass(frozen=True)
class Template:
    """Text around every caption, and which positions of the whole are stored."""

    before: str = ""
    after: str = ""
    crop_start: int | str = 0
    """Number of positions left out at the start; `template`: all before the caption; `template-N`:
    all of these but the last N."""
    crop_end: int = 0
    """Number of positions left out at the end."""
    keep_first: int = 0
    """Number of positions at the very start that are stored though `crop_start` holds them."""

    def __post_init__(self) -> None:
        start = self.crop_start
        good = start >= 0 if isinstance(start, int) else TEMPLATE_CROP.fullmatch(start)
        require(
            bool(good),
            f"crop_start is {start}: expected template, template-N with a number N, or a number of "
            "0 or more.",
        )

    @property
    def last_kept(self) -> int | None:
        """The N of template-N; None if crop_start is a number."""
        found = None if isinstance(self.crop_start, int) else TEMPLATE_CROP.match(self.crop_start)
        return found and int(found[1] or 0)

    @property
    def format_string(self) -> str:
        """Template and {text} in one."""
        before, after = (
            each.replace("{", "{{").replace("}", "}}") for each in (self.before, self.after)
        )
        return f"{before}{{text}}{after}"

    @classmethod
    def parse(
        cls, text: str, crop_start: int | str = 0, crop_end: int = 0, keep_first: int = 0
    ) -> Template:
        """`text` is a format string with {text} in it. Raises InputError."""
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise InputError(f"template {text!r} is not a format string: {error}.") from None
        named = [number for number, part in enumerate(parts) if part[1] is not None]
        if len(named) != 1 or parts[named[0]][1:] != ("text", "", None):
            raise InputError(
                f"template {text!r}: expected {{text}} in it once, and no other field. "
                "Write {{ and }} for braces."
            )
        literals = [part[0] for part in parts]
        split = named[0] + 1
        before, after = "".join(literals[:split]), "".join(literals[split:])
        return cls(before, after, crop_start, crop_end, keep_first)


class CaptionTokenizer:
    """A checkpoint's fast tokenizer, cutting captions at `max_length` tokens."""

    name: str
    """The tokenizer's class in transformers."""
    by_bytes: bool
    """A token is a byte."""
    longest: int
    """Number of tokens of the longest caption: max_length plus what is cropped before it."""
    first: int
    """The first position that is stored, apart from `keep_first` at the very start."""
    keep_first: int
    pads_left: bool
    pad_id: int | None
    """Id of the pad token; None if no pad is ever attended."""
    eos_id: int | None
    for_empty: str | None
    """What is encoded of an empty caption; None: nothing is."""
    max_id: int
    """Highest id of the vocabulary, added tokens included."""
    empty: Tokenized
    """The empty caption, tokenised, or what stands for it; it fills up batches, so there are ids
    also where nothing stands for it."""
    digest: str
    """sha256 of the vocabulary, and of the ids of a fixed set of texts, whole and truncated."""

    def __init__(
        self,
        where: str,
        folder: Path,
        max_length: int,
        special_tokens: Sequence[str],
        template: Template | Callable[[Any], Template] | None = None,
        *,
        text_steps: Sequence[Step] = (),
        empty: Empty = "encode",
        stored_pads: int = 0,
        adds_special_tokens: bool = True,
        pads_left: bool = False,
    ) -> None:
        """`where` begins every error; `special_tokens` as in `load_tokenizer`.

        `template` may also be made of transformers' tokenizer. `text_steps` and `empty` as in
        `EncoderConfig`. `stored_pads`: so many pads after a caption are stored too, up to
        `longest`. `adds_special_tokens`: those that the tokenizer itself puts around a text.
        `pads_left`: pads stand before a caption, whatever the tokenizer's own setting is.

        Raises InputError: no usable fast tokenizer, or one that the template does not fit.
        """
        # A family with templates says itself on which side the pads are.
        any_side = template is not None
        tokenizer = load_tokenizer(where, folder, special_tokens, any_side=any_side)
        self.name = type(tokenizer).__name__
        self.eos_id, self._unk_id = tokenizer.eos_token_id, tokenizer.unk_token_id
        self.pad_id = tokenizer.pad_token_id if "pad_token" in special_tokens else None
        self.by_bytes = self.name == BYTES
        # Only the Rust tokenizer is kept. transformers' own object is dropped: its __call__ would
        # set truncation and padding again.
        self._backend: Any = (
            ByteTokenizer(tokenizer) if self.by_bytes else tokenizer.backend_tokenizer
        )
        self._backend.encode_special_tokens = bool(tokenizer.split_special_tokens)
        self._backend.no_padding()
        self._backend.no_truncation()
        self.max_id = max(self._backend.get_vocab(with_added_tokens=True).values())
        direction = str(tokenizer.truncation_side)
        self.template = template(tokenizer) if callable(template) else template or Template()
        self._adds = adds_special_tokens
        if direction != "right" and (self.template.before or self.template.after):
            raise InputError(
                f"{where}: the tokenizer in {folder} has truncation_side {direction!r}, which cuts "
                "long captions at their beginning, and with them the template before. Set it to "
                "'right' in tokenizer_config.json."
            )
        self.digest = self._probe(direction)
        self._num_before, self._num_after, self.first = self._template_tokens(where)
        self.keep_first, self.pads_left = self.template.keep_first, pads_left
        if self.keep_first > self.first:
            raise InputError(
                f"{where}: keep_first is {self.keep_first}, and crop_start leaves out only "
                f"{self.first} positions. Lower keep_first: what is not cropped is stored anyway."
            )
        self.longest = self.first - self.keep_first + max_length
        self._clean, self._stored_pads = make_cleaner(text_steps), stored_pads
        self.for_empty = {"encode": "", "space": " ", "nothing": None}[empty]
        self._unknown_in_empty = 0
        self.empty = self.encode_prepared([self.for_empty or ""])
        self._unknown_in_empty, self.empty.unknown[0] = self.empty.unknown[0], 0
        if self.longest < self.empty.num_ids[0]:
            raise InputError(
                f"{where}: max_length {max_length} leaves no room: the empty caption alone has "
                f"{self.empty.num_ids[0] - self.longest + max_length} special tokens. Raise "
                "max_length."
            )
        if self.empty.stored[0] < 1 and self.for_empty is not None:
            raise InputError(
                f"{where}: the empty caption has no token to store, and every dataset holds its "
                "embedding. Give a template with text after {text}, crop less, or set `empty`."
            )
        self._backend.enable_truncation(self.longest, direction=direction)

    @property
    def template_stored(self) -> int:
        """How many positions of the template are stored with a caption that is not cut off."""
        return self._num_before + self._num_after - self.first + self.keep_first

    @property
    def unknown_marks(self) -> list[str]:
        """What looks like a special token in the template and is none of this tokenizer's."""
        marks = SPECIAL.findall(f"{self.template.before} {self.template.after}")
        return [mark for mark in marks if self._backend.token_to_id(mark) is None]

    def encode(self, texts: Sequence[str]) -> Tokenized:
        """Clean and tokenise captions; safe to call from several threads."""
        return self.encode_prepared([self.prepare(text) for text in texts])

    def prepare(self, text: str) -> str | None:
        """What is encoded of a text, without the template; None: nothing is."""
        return self._clean(text) or self.for_empty

    def encode_prepared(self, texts: Sequence[str | None]) -> Tokenized:
        """Tokenise what `prepare` gave; for None the caption has no ids."""
        encodings = self._encode([text or "" for text in texts])
        ids = [
            np.asarray([] if text is None else encoding.ids, dtype=np.int32)
            for text, encoding in zip(texts, encodings, strict=True)
        ]
        num_ids = [len(each) for each in ids]
        pads = [min(self._stored_pads, self.longest - n) if n else 0 for n in num_ids]
        truncated = [bool(encoding.overflowing) for encoding in encodings]
        # What is cut is the end, and with it the template's text after the caption.
        others = [self._num_before + (0 if cut else self._num_after) for cut in truncated]
        cropped = self.first + self.template.crop_end
        return Tokenized(
            ids=ids,
            num_ids=num_ids,
            first=[self.first] * len(ids),
            stored=[
                self.keep_first + max(0, ids + pad - cropped) if ids else 0
                for ids, pad in zip(num_ids, pads, strict=True)
            ],
            tokens=[max(0, count - other) for count, other in zip(num_ids, others, strict=True)],
            truncated=truncated,
            # CLIP uses one token as unknown token and as end token. So the number of these in the
            # empty caption is subtracted.
            unknown=np.maximum(0, self._unknown(ids) - self._unknown_in_empty).tolist(),
            pads=pads,
        )

    def _unknown(self, ids: Sequence[NDArray[np.int32]]) -> NDArray[np.int64]:
        """How often the unknown token is in each caption."""
        found = np.concatenate([np.zeros(0, np.int32), *ids]) == self._unk_id
        before: NDArray[np.int64] = np.concatenate(([0], np.cumsum(found)))
        counts: NDArray[np.int64] = np.diff(before[np.cumsum([0, *map(len, ids)])])
        return counts

    def _encode(self, texts: Sequence[str]) -> list[Any]:
        whole = [f"{self.template.before}{text}{self.template.after}" for text in texts]
        encodings: list[Any] = self._backend.encode_batch_fast(whole, add_special_tokens=self._adds)
        return encodings

    def _probe(self, direction: str) -> str:
        """Digest of the vocabulary and of the probes' ids, whole, and cut at a fixed length.

        The probes show how text is cut into words, and what the special tokens are; no probe has
        every entry of a vocabulary. max_length is not in the digest.
        """
        model = json.loads(self._backend.to_str())["model"]
        # Releases of tokenizers write a merge as a string or as a pair.
        merges = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges", [])]
        empty, *whole = self._encode(["", *PROBES])
        self._backend.enable_truncation(len(empty.ids) + 7, direction=direction)
        cut = self._encode(PROBES)
        self._backend.no_truncation()
        ids = {"whole": [e.ids for e in whole], "cut": [e.ids for e in cut]}
        return digest_of({**ids, "vocabulary": model["vocab"], "merges": merges})

    def _template_tokens(self, where: str) -> tuple[int, int, int]:
        """Number of the template's tokens before a caption and after it, and the first position
        that is stored.

        Raises InputError if the tokens that are left out at the start change with the caption. Also
        if crop_start is neither 0 nor the number of the tokens before the caption.
        """
        template, first = self.template, 0
        probes = [encoding.ids for encoding in self._encode(BEGINNINGS)]
        # Without a template, special tokens that the tokenizer adds count as the caption's own.
        before = after = 0
        if template.before:
            before = _num_common(probes)
        if template.before or template.after:
            after = _num_common([ids[::-1] for ids in probes])
        if template.before and template.crop_start != 0:
            alone = self._backend.encode(template.before, add_special_tokens=self._adds)
            added_at_end = alone.special_tokens_mask[::-1].index(0)
            count = len(alone.ids) - added_at_end
            if template.crop_start not in ("template", count) and template.last_kept is None:
                raise InputError(
                    f"{where}: crop_start is {template.crop_start}, and with this tokenizer the "
                    f"template has {count} tokens before the caption. Give that number or "
                    "template; 0 stores the template, too."
                )
            first = count - (template.last_kept or 0)
            if first < 0:
                raise InputError(
                    f"{where}: crop_start is {template.crop_start}, and with this tokenizer the "
                    f"template has only {count} tokens before the caption."
                )
            if alone.ids[:first] != probes[0][: min(first, before)]:
                raise InputError(
                    f"{where}: the last token of the template's text before the caption "
                    f"({template.before[-20:]!r}) changes with the caption that follows, so no "
                    "position divides the two. End it with a special token or a line break, or "
                    "store that token too (crop_start template-1)."
                )
        return before, after, first


def _num_common(rows: Sequence[Sequence[int]]) -> int:
    """Number of ids that all rows have in common at their beginning."""
    same = [len(set(column)) == 1 for column in zip(*rows, strict=False)]
    return [*same, False].index(False)


def load_tokenizer(
    where: str, folder: Path, special_tokens: Sequence[str], *, any_side: bool = False
) -> Any:
    """transformers' tokenizer of a folder, fast but for ByT5's, with these special tokens.

    Raises InputError: no tokenizer, a slow one (its ids differ), a special token is missing, or a
    needed pad token goes to the left; `any_side`: it may.
    """
    from transformers import AutoTokenizer

    with quiet_transformers():
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # the Rust side raises plain Exception for a damaged file
            reason = one_line(error)[:300]
            advice = WHAT_IS_NEEDED
            if any(folder.glob("*.model")) and find_spec("sentencepiece") is None:
                # transformers asks for tiktoken then, which would not help.
                advice = "Its SentencePiece model needs `pip install sentencepiece protobuf`."
            raise InputError(
                f"{where}: {folder} gives no tokenizer ({type(error).__name__}: {reason}). {advice}"
            ) from error
    by_bytes = type(tokenizer).__name__ == BYTES
    if not tokenizer.is_fast and not by_bytes:
        raise InputError(
            f"{where}: {folder} has only a slow tokenizer ({type(tokenizer).__name__}), whose ids "
            "differ from the fast one's. Save a fast one (tokenizer.json) in the same folder."
        )
    if not by_bytes and not any((folder / name).is_file() for name in VOCABULARIES):
        # transformers 5 makes an empty tokenizer then, for which every word is unknown.
        raise InputError(f"{where}: {folder} gives no tokenizer. {WHAT_IS_NEEDED}")
    for name in special_tokens:
        if getattr(tokenizer, f"{name}_id") is None:
            raise InputError(
                f"{where}: the tokenizer in {folder} has no {name}. Set it in "
                "tokenizer_config.json as the checkpoint's authors did."
            )
    if "pad_token" in special_tokens and tokenizer.padding_side != "right" and not any_side:
        raise InputError(
            f"{where}: the tokenizer in {folder} pads on the {tokenizer.padding_side}: text "
            "encoders are padded on the right. Set padding_side in tokenizer_config.json."
        )
    return tokenizer


@dataclass(frozen=True)
class TokenBatch:
    """Input of one forward; captions after the first `len(rows)` only fill it up."""

    input_ids: NDArray[np.int64]
    """[B, L]: one caption per line, padded with the pad id. Packed: [1, T], captions end to end,
    pads after the last one."""
    lengths: NDArray[np.int32]
    """[C] number of real tokens of each caption, special tokens included; C is B unless packed."""
    extents: NDArray[np.int32]
    """[C] number of positions of each caption: its tokens, and the pads that are stored of it."""
    first: NDArray[np.int32]
    """[C] as in `Tokenized`; counted from the caption's own first token."""
    stored: NDArray[np.int32]
    """[C] as in `Tokenized`."""
    rows: NDArray[np.int64]
    """[n], n <= C: for each of the first n captions of the batch, its index in the list of input
    captions. The other captions are empty and fill the batch up."""
    packed: bool = False
    pads_left: bool = False
    """Pads stand before a caption, not behind it."""

    @property
    def starts(self) -> NDArray[np.int64]:
        """[C] where each caption begins in `input_ids.reshape(-1)`."""
        if self.packed:
            ends: NDArray[np.int64] = np.cumsum(self.extents, dtype=np.int64)
            return ends - self.extents
        lines, length = self.input_ids.shape
        every: NDArray[np.int64] = np.arange(lines, dtype=np.int64) * length
        return every + (length - self.lengths) if self.pads_left else every


def shape_of(num_tokens: int, shapes: Sequence[Shape]) -> Shape:
    """The shape a caption of `num_tokens` runs in: the shortest that holds it."""
    fitting = [shape for shape in shapes if shape[1] >= num_tokens]
    if not fitting:
        raise InternalError(f"A caption has {num_tokens} tokens: no shape of {shapes} holds it.")
    return min(fitting, key=lambda shape: shape[1])


def make_batches(
    captions: Tokenized,
    shapes: Sequence[Shape],
    pad_id: int,
    empty: Tokenized,
    *,
    pads_left: bool = False,
) -> Iterator[TokenBatch]:
    """Batches of all captions with ids: short shapes first, captions of one shape in input order.

    `empty` is the empty caption, which fills up the last batch of each shape.
    """
    rows_of: dict[Shape, list[int]] = {}
    for row, extent in enumerate(captions.extents):
        if extent:
            rows_of.setdefault(shape_of(extent, shapes), []).append(row)
    for shape in sorted(rows_of, key=lambda shape: shape[1]):
        rows = rows_of[shape]
        for start in range(0, len(rows), shape[0]):
            chosen = rows[start : start + shape[0]]
            yield make_batch(captions, chosen, shape, pad_id, empty, pads_left=pads_left)


def make_batch(
    captions: Tokenized,
    rows: Sequence[int],
    shape: Shape,
    pad_id: int,
    empty: Tokenized,
    *,
    pads_left: bool = False,
) -> TokenBatch:
    """A batch of the captions `rows`, at most B; `empty` fills the lines left over."""
    left_over = shape[0] - len(rows)
    lines = [captions.ids[row] for row in rows] + empty.ids * left_over
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    for line, tokens in enumerate(lines):
        start = shape[1] - len(tokens) if pads_left else 0
        input_ids[line, start : start + len(tokens)] = tokens

    def column(of_captions: list[int], of_empty: list[int]) -> NDArray[np.int32]:
        return np.array([of_captions[row] for row in rows] + of_empty * left_over, dtype=np.int32)

    return TokenBatch(
        input_ids,
        column(captions.num_ids, empty.num_ids),
        column(captions.extents, empty.extents),
        column(captions.first, empty.first),
        column(captions.stored, empty.stored),
        np.array(rows, dtype=np.int64),
        pads_left=pads_left,
    )


def pack(captions: Tokenized, num_tokens: int, pad_id: int) -> Iterator[TokenBatch]:
    """Packed streams of `num_tokens` tokens that hold all captions with ids, end to end.

    Each stream takes the longest caption that still fits, again and again: the long ones come
    first, short ones fill the gaps, and captions of one length lie next to each other.
    """
    rows_of: dict[int, list[int]] = {}
    extents = captions.extents
    for row in range(len(captions) - 1, -1, -1):
        rows_of.setdefault(extents[row], []).append(row)  # popped from the end
    rows_of.pop(0, None)  # of these nothing is encoded
    if rows_of and max(rows_of) > num_tokens:
        raise InternalError(f"A caption has {max(rows_of)} tokens: a stream has {num_tokens}.")
    while rows_of:
        rows: list[int] = []
        left = num_tokens
        for length in sorted(rows_of, reverse=True):
            while left >= length and rows_of[length]:
                rows.append(rows_of[length].pop())
                left -= length
            if not rows_of[length]:
                del rows_of[length]
        packed = captions.select(rows)
        input_ids = np.full((1, num_tokens), pad_id, dtype=np.int64)
        lines = zip(packed.ids, packed.pads, strict=True)
        padded = [np.append(ids, [pad_id] * pads) if pads else ids for ids, pads in lines]
        input_ids[0, : num_tokens - left] = np.concatenate(padded)
        yield TokenBatch(
            input_ids,
            np.array(packed.num_ids, dtype=np.int32),
            np.array(packed.extents, dtype=np.int32),
            np.array(packed.first, dtype=np.int32),
            np.array(packed.stored, dtype=np.int32),
            np.array(rows, dtype=np.int64),
            packed=True,
        )
