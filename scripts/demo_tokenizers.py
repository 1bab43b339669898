"""Train the demo's tokenizers: a T5-like Unigram and a CLIP-like byte pair encoding.

Guarantees: same corpus, same tokenizer.json. The trainers of the tokenizers library do not give
that (on each call they walk their hash maps in another order), hence the two small ones here.
Costs: about half a second on one core for 3,000 captions; larger corpora count only their 4,000
most useful words. The vocabularies are good enough for a demo and for tests, no better.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

MAX_PIECE_CHARS = 12
TRAINING_WORDS = 4000


def _train_unigram(corpus: Sequence[str], vocab_size: int) -> list[tuple[str, float]]:
    """Pieces and log probabilities: characters, words and the most useful substrings.

    ASCII is always there: a recipe adds numbers that no caption of the corpus need hold.
    """
    words = Counter(f"\u2581{word}" for text in corpus for word in text.split())
    characters = Counter(chr(code) for code in range(ord("!"), ord("~") + 1))
    substrings: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    for word, count in _most_common(words, TRAINING_WORDS, weight=1):
        for start in range(len(word)):
            for end in range(start + 2, min(len(word), start + MAX_PIECE_CHARS) + 1):
                substrings[word[start:end]] += count
    chosen = dict(_most_common(characters, (vocab_size - 3) // 2, weight=1))
    chosen.update(_most_common(words, (vocab_size - 3 - len(chosen)) // 2, weight=1))
    rest = Counter({piece: count for piece, count in substrings.items() if piece not in chosen})
    chosen.update(_most_common(rest, vocab_size - 3 - len(chosen), weight=0))
    total = sum(chosen.values())
    # Rounded, so that no machine's log() shows in the file.
    pieces = [(piece, round(math.log(count / total), 4)) for piece, count in chosen.items()]
    return [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces]


def _most_common(counts: Counter[str], limit: int, *, weight: int) -> list[tuple[str, int]]:
    """The `limit` best strings by count x (length - 1 + weight); equal ones in code point order."""
    scored = sorted(counts.items(), key=lambda kv: (-kv[1] * (len(kv[0]) - 1 + weight), kv[0]))
    return scored[: max(limit, 0)]


def _train_byte_pairs(corpus: Sequence[str], num_merges: int) -> list[tuple[str, str]]:
    """Byte pair merges, most frequent pair first; equal counts in code point order."""
    splitter = _clip_pre_tokenizer()
    counts: Counter[str] = Counter()
    for text in corpus:
        counts.update(word for word, _ in splitter.pre_tokenize_str(text.lower()))
    common = _most_common(counts, TRAINING_WORDS, weight=1)
    words = [[*word[:-1], f"{word[-1]}</w>"] for word, _ in common]
    pairs: Counter[tuple[str, str]] = Counter()
    places: dict[tuple[str, str], set[int]] = {}
    for index, word in enumerate(words):
        for pair in itertools.pairwise(word):
            pairs[pair] += common[index][1]
            places.setdefault(pair, set()).add(index)
    merges: list[tuple[str, str]] = []
    while pairs and len(merges) < num_merges:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < 2:
            break
        merges.append(best)
        for index in places[best]:
            for pair in itertools.pairwise(words[index]):
                pairs[pair] -= common[index][1]
            words[index] = _merge(words[index], best)
            for pair in itertools.pairwise(words[index]):
                pairs[pair] += common[index][1]
                places.setdefault(pair, set()).add(index)
        del pairs[best]
    return merges


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    """`word` with every occurrence of `pair`, from the left, made one symbol."""
    merged: list[str] = []
    for symbol in word:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def _clip_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """CLIP's words: contractions, runs of letters, single digits, runs of the rest; as bytes."""
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def t5_tokenizer(corpus: Sequence[str], vocab_size: int) -> Tokenizer:
    """Unigram with metaspace, as T5's: NFKC, one space between words, </s> behind the caption."""
    tokenizer = Tokenizer(models.Unigram(_train_unigram(corpus, vocab_size), unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def clip_tokenizer(corpus: Sequence[str], vocab_size: int) -> Tokenizer:
    """Byte pairs with </w>, as CLIP's: lower case, and the two special tokens as highest ids."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols += [f"{symbol}</w>" for symbol in symbols]
    merges = _train_byte_pairs(corpus, vocab_size - len(symbols) - 2)
    # Two pairs can make the same symbol ("a" + "bc", "ab" + "c"): it has one id.
    symbols = list(dict.fromkeys([*symbols, *(left + right for left, right in merges)]))
    start, end = "<|startoftext|>", "<|endoftext|>"
    vocab = {symbol: index for index, symbol in enumerate([*symbols, start, end])}
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, end_of_word_suffix="</w>", unk_token=end, fuse_unk=False)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = _clip_pre_tokenizer()
    tokenizer.add_special_tokens([start, end])
    tokenizer.post_processor = processors.RobertaProcessing(
        (end, vocab[end]), (start, vocab[start]), trim_offsets=False, add_prefix_space=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
