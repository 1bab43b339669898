"""Turns an encoder's configuration into one decision, which all later code uses.

`open_encoder` finds and checks checkpoint and tokenizer. `resolve` adds the family's decision, with
the help of the stored plan if there is one. Neither loads a model or needs torch. What is decided
depends on the configuration, the checkpoint and the captions, never on the machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from embed_precompute.documents import to_plain
from embed_precompute.encoders.checkpoint import (
    Checkpoint,
    Need,
    locate,
    open_checkpoint,
    tokenizer_in,
)
from embed_precompute.encoders.families import FAMILIES
from embed_precompute.encoders.families.base import (
    Decision,
    EncoderConfig,
    Facts,
    Family,
    OpenEncoder,
    Output,
    Sizes,
)
from embed_precompute.encoders.hub import split_hub_id
from embed_precompute.encoders.text_steps import require_packages
from embed_precompute.encoders.tokenizer import TokenBatch, Tokenized, make_batches, pack
from embed_precompute.encoders.weights import weights_digest
from embed_precompute.errors import InputError
from embed_precompute.steps import Work


@dataclass(frozen=True)
class ResolvedEncoder:
    """One encoder with everything decided."""

    opened: OpenEncoder[Any]
    family: Family[Any]
    outputs: tuple[Output, ...]
    decision: Decision

    @property
    def name(self) -> str:
        return self.opened.name

    @property
    def options(self) -> Any:
        """The options of the family."""
        return self.opened.options

    def tensors(self) -> dict[str, Output]:
        """The outputs, by the names that the dataset has for their tensors."""
        return {self.name + output.suffix: output for output in self.outputs}

    def stored_lengths(self, output: Output, captions: Tokenized, *, null: bool) -> list[int]:
        """Number of stored vectors of each caption; `null`: the caption is the null embedding's."""
        if output.per == "caption":
            return [1] * len(captions)
        if output.positions != "all":
            return captions.stored
        length, tokenizer = self.decision.padded_length, self.opened.tokenizer
        if null:
            length = self.decision.null_shape[1]
        assert length is not None, "all positions are stored where there is one padded length"
        return [length - tokenizer.first + tokenizer.keep_first] * len(captions)

    def flops(self, captions: Tokenized, *, pads: bool = True) -> float:
        """Of the layers over these captions, see `Sizes.flops`. Pads count where every caption is
        padded to one length, but without `pads` they do not, and ids that are computed once for all
        captions do not."""
        length = self.decision.padded_length if pads else None
        return self.sizes.flops([length or own for own in self.unshared(captions).num_ids])

    @property
    def sizes(self) -> Sizes:
        """Those of the model, with the layers that are run."""
        checkpoint = self.opened.checkpoint
        layers = self.family.layers_run(self.options, checkpoint)
        return replace(self.family.sizes(checkpoint), layers=layers)

    def batches(self, captions: Tokenized, *, null: bool = False) -> Iterator[TokenBatch]:
        """The token batches that hold `captions`; `null`: those of the null embedding."""
        tokenizer, decision = self.opened.tokenizer, self.decision
        pad_id = tokenizer.pad_id or 0
        if decision.packed:
            return pack(self.unshared(captions), decision.shapes[0][1], pad_id)
        shapes = (decision.null_shape,) if null else decision.shapes
        return make_batches(
            captions, shapes, pad_id, tokenizer.empty, pads_left=tokenizer.pads_left
        )

    def unshared(self, captions: Tokenized) -> Tokenized:
        """The captions as a forward runs them: without ids that are computed once for all."""
        shared = self.family.shared_prefix(self.options, self.opened.tokenizer)
        return captions.without_first(len(shared))

    def every_shape(self) -> Iterator[TokenBatch]:
        """One token batch of each shape, filled with the empty caption: each must fit in memory."""
        tokenizer, decision = self.opened.tokenizer, self.decision
        if decision.packed:
            yield from self.batches(tokenizer.empty)
            return
        for shape in sorted({*decision.shapes, decision.null_shape}):
            yield from make_batches(
                tokenizer.empty,
                (shape,),
                tokenizer.pad_id or 0,
                tokenizer.empty,
                pads_left=tokenizer.pads_left,
            )

    @property
    def weights(self) -> str | None:
        """Digest of what the encoder computes with; None if the checkpoint was opened without
        weights. Raises InputError: a file is damaged."""
        checkpoint = self.opened.checkpoint
        return weights_digest(checkpoint, self.family, self.options) if checkpoint.files else None

    def spec(self) -> dict[str, Any]:
        """All settings of this encoder that change bytes, as JSON: its part of the fingerprint."""
        options, tokenizer = self.options, self.opened.tokenizer
        return {
            "kind": options.kind,
            "model_type": self.family.config_values(self.opened.checkpoint)["model_type"],
            "weights": self.weights,
            "tokenizer": tokenizer.digest,
            "pad_token_id": tokenizer.pad_id,
            "max_length": options.max_length,
            "text_steps": list(options.text_steps),
            "empty": options.empty,
            "dtype": options.dtype,
            "tf32": options.tf32,
            "outputs": to_plain(self.outputs),
            **to_plain(self.decision),
            **self.family.spec(self.opened),
        }


def open_encoder(
    name: str,
    options: EncoderConfig,
    *,
    with_weights: bool = True,
    online: bool = False,
    copies: bool = True,
) -> OpenEncoder[Any]:
    """Find checkpoint and tokenizer, and check that they belong together.

    Without weights the encoder can be asked for everything but its digest. `online`: what is
    missing of config and tokenizer is downloaded. `copies`: a copy that `fetch` made is taken.
    Raises InputError naming the field of `encoders.<name>`.
    """
    family, where = FAMILIES[options.kind], f"encoders.{name}"
    require_packages(where, options.text_steps)
    without: Need = "config" if options.tokenizer is None else "config.json"
    with Work(f"{where}: opening checkpoint and tokenizer"):
        checkpoint = open_checkpoint(
            f"{where}.pretrained",
            options.pretrained,
            options.revision,
            options.kind,
            family.models,
            dtype=options.dtype if copies else None,
            part=options.part,
            tokenizer=options.tokenizer,
            need="weights" if with_weights else without,
            online=online,
        )
        require_release(checkpoint, family.releases)
        tokenizer_where, folder = f"{where}.pretrained", checkpoint.folder
        if options.tokenizer is not None:
            tokenizer_where = f"{where}.tokenizer"
            ids = (options.pretrained, options.tokenizer)
            same = len({split_hub_id(each)[0] for each in ids}) == 1
            folder = tokenizer_in(checkpoint.folder, options.tokenizer) or locate(
                tokenizer_where,
                options.tokenizer,
                options.revision if same else None,
                "tokenizer",
                online=online,
            )
        # First: the tokenizer reads config.json too, and would not blame a bad one.
        rows = family.sizes(checkpoint).vocabulary
        tokenizer = family.open_tokenizer(tokenizer_where, folder, options)
    if tokenizer.max_id >= rows:
        raise InputError(
            f"{tokenizer_where}: the tokenizer has ids up to {tokenizer.max_id}, but the model in "
            f"{checkpoint.folder} has {rows} embeddings. This is another model's tokenizer."
        )
    opened = OpenEncoder(name, options, checkpoint, tokenizer, folder)
    family.check(opened)
    outputs = family.outputs(options, checkpoint)
    for output in outputs:
        if options.width not in (None, output.width):
            raise InputError(
                f"{where}.width is {options.width}, and {checkpoint.folder} makes vectors of "
                f"{output.width}: it is another model than the preset's. Choose its checkpoint, or "
                "set the width to null if another is meant."
            )
    for output in outputs if options.empty == "nothing" else ():
        if output.positions in (None, "all"):
            what = "a vector per caption" if output.per == "caption" else "every position"
            raise InputError(
                f"{where}.empty is nothing: text_{name}{output.suffix} stores {what}, so an empty "
                "caption has something to store. Use encode or space."
            )
    return opened


def open_encoders(
    encoders: Mapping[str, EncoderConfig],
    *,
    with_weights: bool,
    online: bool = False,
    copies: bool = True,
) -> list[OpenEncoder[Any]]:
    """All of them, sorted by name; see `open_encoder`. The InputError names each that cannot be
    opened."""
    opened, mistakes = list[OpenEncoder[Any]](), dict[str, InputError]()
    for name, options in encoders.items():
        try:
            opened.append(
                open_encoder(name, options, with_weights=with_weights, online=online, copies=copies)
            )
        except InputError as error:
            mistakes[name] = error
    if mistakes:
        first, *others = mistakes
        also = f"{', '.join([first, *others])} cannot be opened. The first: " if others else ""
        raise InputError(f"{also}{mistakes[first]}") from mistakes[first]
    return sorted(opened, key=lambda each: each.name)


def require_release(checkpoint: Checkpoint, releases: Mapping[str, str]) -> None:
    """Raise InputError if transformers here is older than the first release with this model."""
    found, first = version("transformers"), releases.get(checkpoint.model_type)
    if first is not None and _numbers(found) < _numbers(first):
        raise InputError(
            f"{checkpoint.where}: {checkpoint.folder / 'config.json'} has model_type "
            f"{checkpoint.model_type!r}, which transformers has since {first}, and this is "
            f"{found}. Install transformers {first} or newer."
        )


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", release)[:3])


def resolve(
    opened: OpenEncoder[Any],
    stored: Mapping[str, Any] | None = None,
    added_tokens: Mapping[int, int] | None = None,
) -> ResolvedEncoder:
    """Decide everything that is left; the arguments as in `Facts`. Raises InputError."""
    family = FAMILIES[opened.options.kind]
    decision = family.decide(opened, Facts(stored, added_tokens))
    outputs = family.outputs(opened.options, opened.checkpoint)
    return ResolvedEncoder(opened, family, outputs, decision)
