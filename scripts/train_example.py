"""Train a small MMDiT-like model by flow matching on a finished dataset: how a trainer reads it.

Everything between dataset and model is what a real trainer uses: `EmbeddingDataset`,
`EmbeddingLoader`, `ConditionDropout`, `prepare_ids`. The model, its sizes and its latents are toys:
a latent is a fixed random projection of the caption's own pooled embedding, so that a model that
uses its condition has a lower loss. The same arguments give the same losses on one machine.
Takes about half a minute on one CPU core for the demo's dataset; needs no video and no GPU.

    python scripts/train_example.py OUT [--steps 300] [--seq-align 1] [--device cpu]

The flow: x_t = (1 - t) x_0 + (sigma_min + (1 - sigma_min) t) noise, target (1 - sigma_min) noise -
x_0, t = 1 is noise (as scripts/diffusion/train.py of hpcaitech/Open-Sora).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from embed_precompute import ConditionDropout, EmbeddingDataset, EmbeddingLoader, prepare_ids
from embed_precompute.errors import EmbedPrecomputeError

SIGMA_MIN = 1e-5
LATENT_SHAPE = (4, 2, 4, 6)  # C, T, H, W
PATCH_SIZE = 2
AXES = (8, 12, 12)  # of a head's width, for t, h, w
HEADS = 2
WIDTH = HEADS * sum(AXES)
BLOCKS = 2
DROPOUT = {"t5": 0.31622777, "clip": 0.31622777}  # Open-Sora's: 10 % lose both


@dataclass(frozen=True)
class Tensors:
    """Which tensors of the dataset are the model's text sequence and its vector."""

    t5: str
    clip: str
    t5_dim: int
    clip_dim: int

    @staticmethod
    def of(dataset: EmbeddingDataset) -> Tensors:
        """The first tensor per token and the first per caption, by name."""
        found: dict[str, tuple[str, int]] = {}
        for name, tensor in sorted(dataset.tensors.items()):
            found.setdefault(tensor.per, (f"text_{name}", tensor.width))
        if len(found) < 2:
            raise SystemExit(f"expected one T5 and one CLIP encoder, found {dataset.tensors}.")
        (t5, t5_dim), (clip, clip_dim) = found["token"], found["caption"]
        return Tensors(t5, clip, t5_dim, clip_dim)


def rotary(ids: Tensor) -> Tensor:
    """(t, h, w) of each token, [B, L, 3] -> complex turns [B, 1, L, head / 2]."""
    angles = []
    for axis, size in enumerate(AXES):
        frequencies = 10_000.0 ** -(torch.arange(0, size, 2, device=ids.device) / size)
        angles.append(ids[..., axis, None].float() * frequencies)
    turned = torch.cat(angles, dim=-1)
    return torch.polar(torch.ones_like(turned), turned)[:, None]


def turn(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate pairs of [B, heads, L, head] by `turns`."""
    pairs = torch.view_as_complex(rearrange(x.float(), "b h l (d two) -> b h l d two", two=2))
    turned = torch.view_as_real(pairs * turns)
    return rearrange(turned, "b h l d two -> b h l (d two)").type_as(x)


class Stream(nn.Module):
    """What text and video each have for themselves in a block: modulation, projections, MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(4 * WIDTH, WIDTH)
        )

    def project(self, x: Tensor, vec: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """q, k, v as [3, B, heads, L, head], and what `finish` needs."""
        shift, scale, *rest = self.modulation(functional.silu(vec))[:, None].chunk(6, dim=-1)
        qkv = self.qkv(functional.layer_norm(x, (WIDTH,)) * (1 + scale) + shift)
        return rearrange(qkv, "b l (three h d) -> three b h l d", three=3, h=HEADS), tuple(rest)

    def finish(self, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        gate, shift, scale, mlp_gate = modulation
        x = x + gate * self.out(attended)
        mapped: Tensor = self.mlp(functional.layer_norm(x, (WIDTH,)) * (1 + scale) + shift)
        return x + mlp_gate * mapped


class Block(nn.Module):
    """Text and video attend to each other as one sequence, with weights of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.txt, self.img = Stream(), Stream()

    def forward(
        self, txt: Tensor, img: Tensor, vec: Tensor, turns: Tensor
    ) -> tuple[Tensor, Tensor]:
        of_txt, txt_modulation = self.txt.project(txt, vec)
        of_img, img_modulation = self.img.project(img, vec)
        q, k, v = torch.cat([of_txt, of_img], dim=3)
        attended = functional.scaled_dot_product_attention(turn(q, turns), turn(k, turns), v)
        joined = rearrange(attended, "b h l d -> b l (h d)")
        length = txt.shape[1]
        return (
            self.txt.finish(txt, joined[:, :length], txt_modulation),
            self.img.finish(img, joined[:, length:], img_modulation),
        )


class TinyMMDiT(nn.Module):
    """The inputs of Open-Sora's model, its outline, and a thousandth of its width squared."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        patch = LATENT_SHAPE[0] * PATCH_SIZE**2
        self.txt_in = nn.Linear(tensors.t5_dim, WIDTH)
        self.img_in = nn.Linear(patch, WIDTH)
        self.vec_in = nn.Linear(tensors.clip_dim, WIDTH)
        self.time_in = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.img_out = nn.Linear(WIDTH, patch)

    def forward(
        self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, y_vec: Tensor, t: Tensor
    ) -> Tensor:
        """Predicted velocity of the patches, [B, N, C * patch * patch]."""
        frequencies = torch.exp(-torch.arange(WIDTH // 2, device=t.device) / WIDTH * 18)
        angles = 1000 * t[:, None] * frequencies
        vec = self.time_in(torch.cat([angles.cos(), angles.sin()], dim=1)) + self.vec_in(y_vec)
        turns = rotary(torch.cat([txt_ids, img_ids], dim=1))
        txt, img = self.txt_in(txt), self.img_in(img)
        for block in self.blocks:
            txt, img = block(txt, img, vec, turns)
        velocity: Tensor = self.img_out(functional.layer_norm(img, (WIDTH,)))
        return velocity


@dataclass
class Trainer:
    """A model, its data and everything random about a run."""

    dataset: EmbeddingDataset
    batch_size: int
    seq_align: int
    device: torch.device
    seed: int

    def __post_init__(self) -> None:
        self.tensors = Tensors.of(self.dataset)
        encoder = self.dataset.tensors[self.tensors.t5.removeprefix("text_")].encoder
        if self.dataset.manifest.spec["encoders"][encoder]["padded_length"] is None:
            raise SystemExit("this example has no attention mask: use attention_mask none.")
        torch.manual_seed(self.seed)
        self.model = TinyMMDiT(self.tensors).to(self.device)
        numbers = torch.Size(LATENT_SHAPE).numel()
        generator = torch.Generator().manual_seed(self.seed)
        projection = torch.randn(self.tensors.clip_dim, numbers, generator=generator)
        self._projection = (projection / self.tensors.clip_dim**0.5).to(self.device)

    def batches(self) -> Iterator[dict[str, Any]]:
        """Shuffled batches, epoch after epoch."""
        loader = EmbeddingLoader(self.dataset, self.batch_size, seed=self.seed, ends="drop")
        while True:
            yield from loader

    def loss(self, batch: dict[str, Any], dropout: ConditionDropout) -> Tensor:
        """Mean squared error of the velocity at a random time for each sample."""
        vec = batch[self.tensors.clip].to(self.device, torch.float32)
        latents = functional.layer_norm(vec, vec.shape[1:]) @ self._projection
        x_0 = latents.view(-1, *LATENT_SHAPE)  # a real trainer: the autoencoder's
        batch = dropout(batch)
        inputs = prepare_ids(
            x_0,
            batch[self.tensors.t5],
            batch[self.tensors.clip],
            patch_size=PATCH_SIZE,
            seq_align=self.seq_align,
        )
        t = torch.rand(len(x_0), device=self.device)
        noise = torch.randn_like(inputs["img"])
        share = t[:, None, None]
        target = (1 - SIGMA_MIN) * noise - inputs["img"]
        mixed = (1 - share) * inputs["img"] + (SIGMA_MIN + (1 - SIGMA_MIN) * share) * noise
        return functional.mse_loss(self.model(**{**inputs, "img": mixed}, t=t), target)

    def train(self, steps: int) -> list[float]:
        """Losses of `steps` steps."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3)
        probabilities = {self.tensors.t5: DROPOUT["t5"], self.tensors.clip: DROPOUT["clip"]}
        dropout = ConditionDropout(self.dataset, probabilities)
        losses = []
        for _, batch in zip(range(steps), self.batches(), strict=False):
            loss = self.loss(batch, dropout)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        return losses

    @torch.no_grad()
    def evaluate(self, prob: float, batches: int = 8) -> float:
        """Mean loss with every condition kept (0) or dropped (1), at the same times and noise."""
        dropout = ConditionDropout(self.dataset, prob)
        torch.manual_seed(self.seed)
        pairs = zip(range(batches), self.batches(), strict=False)
        return fmean(self.loss(batch, dropout).item() for _, batch in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a toy on a dataset of embeddings.")
    parser.add_argument("out", help="folder of the dataset")
    parser.add_argument("--steps", type=int, default=300, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--seq-align", type=int, default=1, help="sequence-parallel size")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        report(arguments)
    except EmbedPrecomputeError as error:
        raise SystemExit(f"train_example: {error}") from None


def report(arguments: argparse.Namespace) -> None:
    """Train, and print the loss on the way and with and without captions."""
    dataset = EmbeddingDataset(arguments.out)
    device = torch.device(arguments.device)
    trainer = Trainer(dataset, arguments.batch_size, arguments.seq_align, device, seed=0)
    losses = trainer.train(arguments.steps)
    every = max(1, len(losses) // 10)
    for step in range(0, len(losses), every):
        print(f"step {step:>5}  loss {fmean(losses[step : step + every]):.4f}")
    print(f"loss with captions    {trainer.evaluate(0.0):.4f}")
    print(f"loss with null texts  {trainer.evaluate(1.0):.4f}")


if __name__ == "__main__":
    main()
