"""Attackers that learn to rebuild images from intercepted tokens.

| attacker | it uses                                                                        |
|----------|--------------------------------------------------------------------------------|
| sequence | the tokens in their order and their sizes; learned queries attend to them      |
| grid     | tokens copied back to the patches they stand for; convolutions                 |
| map      | both: queries attend to tokens whose places are known, and the grid; strongest |

They share a trunk: a canvas of one vector per patch, convolutions, and pixels.
"""

import math
from collections.abc import Iterator

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torchmetrics.functional.image import structural_similarity_index_measure

from tokmerge.merging.packed import Packed
from tokmerge.models.training import train
from tokmerge.privacy.defence import Distortion, receive_batches

ATTACKERS = ("sequence", "grid", "map")
# Of 1 - SSIM beside the squared error: about equal parts in a trained attacker.
SSIM_WEIGHT = 0.05
SSIM_EVERY = 4
# Larger sizes share an embedding: log2 of the patches a token stands for.
SIZE_LEVELS = 12
# Of training until the loss of held-out images stops falling: better by this share counts; after so many checks that
# are not, the rate falls by so much, and after so many falls training ends.
BETTER, PATIENCE, FALL, FALLS = 0.005, 2, 0.3, 3


def grid_encoding(side: int, width: int) -> Tensor:
    """(side * side, width) sinusoidal encoding of each cell's place in a square: near cells have like rows."""
    at = (torch.arange(side) + 0.5) / side
    waves = math.pi * at[:, None] * 2.0 ** torch.linspace(0, 3, width // 4)
    waves = torch.cat([waves.sin(), waves.cos()], dim=1)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)


class CrossAttentionBlock(nn.Module):
    """Queries attend to tokens, then to each other: pre-norm cross-attention, self-attention, MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.across = nn.MultiheadAttention(width, heads, batch_first=True)
        # From the start a query looks for tokens whose place is like its own.
        with torch.no_grad():
            self.across.in_proj_weight[: 2 * width] = 2 * torch.eye(width).repeat(2, 1)
        self.within = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, queries: Tensor, tokens: Tensor, missing: Tensor) -> Tensor:
        """(B, Q, w) queries, (B, N, w) tokens, (B, N) bool: no token there -> (B, Q, w)."""
        x = self.norms[0](queries)
        queries = queries + self.across(x, tokens, tokens, key_padding_mask=missing, need_weights=False)[0]
        x = self.norms[1](queries)
        queries = queries + self.within(x, x, x, need_weights=False)[0]
        return queries + self.mlp(self.norms[2](queries))


class Attacker(nn.Module):
    """A trained decoder, one of `ATTACKERS`, from tokens of width ``dim`` to (C, H, W) images.

    An unmerged image has ``n_tokens``, of which the first ``prefix`` stand for no patch, the others form a square grid.

    Raises:
        ValueError: unknown kind, or patches that do not tile the image in a square grid.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self, kind: str, dim: int, n_tokens: int, prefix: int, image_shape: tuple[int, int, int], width: int = 48
    ) -> None:
        super().__init__()
        if kind not in ATTACKERS:
            raise ValueError(f"unknown attacker {kind!r}: use one of {', '.join(ATTACKERS)}")
        side = round((n_tokens - prefix) ** 0.5)
        channels, height, wide = image_shape
        if side * side != n_tokens - prefix or height != wide or height % side:
            raise ValueError(f"{n_tokens - prefix} patches do not tile {height}x{wide} pixels in a square grid")
        self.kind, self.prefix, self.side, factor = kind, prefix, side, height // side
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        self.embed = nn.Linear(dim, width)
        if kind != "grid":
            # Position in the grid where it is known, in the sequence where it is not.
            self.position = nn.Parameter(torch.cat([torch.zeros(prefix, width), grid_encoding(side, width)]))
            self.size = nn.Embedding(SIZE_LEVELS, width)
            nn.init.zeros_(self.size.weight)
            self.coarse = -(-side // 2)
            self.queries = nn.Parameter(grid_encoding(self.coarse, width))
            self.blocks = nn.ModuleList(CrossAttentionBlock(width, 4) for _ in range(2))
            self.spread = nn.Conv2d(width, 4 * width, 1)
        if kind != "sequence":
            self.dropped = nn.Parameter(torch.zeros(width))
            self.canvas = nn.Parameter(0.1 * torch.randn(width, side, side))
        self.trunk = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        fine = width // 3 if factor <= 4 else 8
        self.pixels = nn.Sequential(nn.Conv2d(width, fine * factor**2, 1), nn.PixelShuffle(factor))
        self.refine = nn.Conv2d(fine, fine, 3, padding=1)
        self.paint = nn.Conv2d(fine, channels, 3, padding=1)

    def forward(self, tokens: Packed) -> Tensor:
        """(B, C, H, W) images, 0 black and 1 white (not clamped)."""
        x = self.embed((tokens.x - self.mean) / self.scale)
        side, batch = self.side, len(tokens.lengths)
        canvas = x.new_zeros(batch, x.shape[1], side, side)
        if self.kind != "grid":
            canvas = canvas + self._attend(x, tokens)
        if self.kind != "sequence":
            assert tokens.source is not None
            source = tokens.source[:, self.prefix :]
            rows = source.clamp(min=0) + tokens.layout.offsets[:, None]
            grid = torch.where((source < 0)[..., None], self.dropped, x[rows])
            canvas = canvas + self.canvas + grid.transpose(1, 2).unflatten(2, (side, side))
        for layer in self.trunk:
            canvas = canvas + F.gelu(layer(canvas))
        fine = F.gelu(self.pixels(canvas))
        return self.paint(fine + F.gelu(self.refine(fine)))

    def _attend(self, x: Tensor, tokens: Packed) -> Tensor:
        """(B, w, side, side) what the queries find in the tokens."""
        levels = tokens.full_sizes.float().log2().long().clamp(max=SIZE_LEVELS - 1)
        x, layout = x + self.size(levels) + self._positions(tokens), tokens.layout
        padded, missing = layout.pad(x), ~layout.valid
        queries = self.queries.expand(len(padded), -1, -1)
        for block in self.blocks:
            queries = block(queries, padded, missing)
        coarse = queries.transpose(1, 2).unflatten(2, (self.coarse, self.coarse))
        return F.pixel_shuffle(self.spread(coarse), 2)[..., : self.side, : self.side]

    def _positions(self, tokens: Packed) -> Tensor:
        """(T, w) where each token is: its patches' mean if the source map is known, else its turn."""
        layout = tokens.layout
        if self.kind == "sequence":
            return self.position[layout.position]
        assert tokens.source is not None
        known = tokens.source >= 0
        rows = (tokens.source.clamp(min=0) + layout.offsets[:, None])[known]
        places = self.position.expand(len(known), -1, -1)[known]
        total = torch.zeros(len(tokens.x), places.shape[1], device=places.device).index_add(0, rows, places)
        return total / torch.bincount(rows, minlength=len(total)).clamp(min=1)[:, None]


def reconstruction_loss(rebuilt: Tensor, images: Tensor, every: int = 1) -> Tensor:
    """Squared error and 1 - SSIM of (B, C, H, W) images in [0, 1]; SSIM, which is slow, of every n-th image only."""
    ssim = structural_similarity_index_measure(rebuilt[::every], images[::every], data_range=1.0)
    assert isinstance(ssim, Tensor)
    return F.mse_loss(rebuilt, images) + SSIM_WEIGHT * (1 - ssim)


def train_attacker(
    attacker: Attacker, tokens: Packed, images: Tensor, distort: Distortion, *, steps: int, check_every: int,
    batch_size: int, lr: float, seed: int, n_check: int = 128, description: str | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Train an attacker in place until it learns no more; noise is drawn anew at every step.

    AdamW's rate falls when the loss of held-out images does not, three times; then training ends, and the weights are
    those of the best check.

    Args:
        tokens, images: intercepted tokens of n images, and those images, (n, C, H, W) uint8.
        distort: what happens on the way, such as `tokmerge.privacy.defence.Defence.receive`.
        steps, check_every: at most; between looks at the held-out images, until the first of which the rate rises.
        batch_size, lr, seed: of AdamW; of batches and noise.
        n_check: the last images, held out to watch convergence.
        description: shown beside the progress bar; None for no bar.

    Returns:
        The curve: step, images (seen so far), loss (of the held-out images), lr.

    Raises:
        ValueError: fewer images than a batch and the held-out ones, or fewer steps than one check takes.
    """
    n = len(images) - n_check
    if n < batch_size:
        raise ValueError(f"{len(images)} images are too few for batches of {batch_size} and {n_check} held out")
    if steps < check_every:
        raise ValueError(f"{steps} steps are fewer than the {check_every} between two checks")
    generator, device = torch.Generator().manual_seed(seed), next(attacker.parameters()).device
    held_out = tokens.images(torch.arange(n, n + n_check))
    values = distort(held_out, generator).to(device).x.float()
    attacker.mean, attacker.scale = values.mean(0), values.std(0).clamp_min(1e-6)
    batches = _shuffled_batches(n, batch_size, generator)
    curve: list[dict[str, float]] = []

    def loss(step: int) -> Tensor:
        rows = next(batches)
        received = distort(tokens.images(rows), generator).to(device)
        return reconstruction_loss(attacker(received), images[rows].to(device) / 255, SSIM_EVERY)

    optimizer = torch.optim.AdamW(attacker.parameters(), lr, weight_decay=0.01)
    rising = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / check_every))
    falling = ReduceLROnPlateau(optimizer, factor=FALL, patience=PATIENCE - 1, threshold=BETTER)
    best: dict[str, Tensor] = {}

    def check(done: int, losses: list[float]) -> bool:
        rebuilt = reconstruct(attacker, held_out, distort, batch_size, torch.Generator().manual_seed(seed))
        held = reconstruction_loss(rebuilt, images[n:] / 255).item()
        if not curve or held < min(row["loss"] for row in curve):
            best.update({name: value.detach().clone() for name, value in attacker.state_dict().items()})
        curve.append({"step": done, "images": done * batch_size, "loss": held, "lr": optimizer.param_groups[0]["lr"]})
        falling.step(held)
        # The schedule that rises would set the rate anew: its base falls with it.
        rising.base_lrs = [group["lr"] for group in optimizer.param_groups]
        return optimizer.param_groups[0]["lr"] < lr * FALL ** (FALLS - 0.5)

    train(
        attacker, loss, ([optimizer], [rising]), steps, clip=1.0, check=check, check_every=check_every,
        description=description,
    )  # fmt: skip
    attacker.load_state_dict(best)
    return pd.DataFrame(curve)


def _shuffled_batches(n: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Positions below n in random order, again and again; what does not fill a batch is left out."""
    while True:
        yield from torch.randperm(n, generator=generator)[: n // batch_size * batch_size].split(batch_size)


def reconstruct(
    attacker: Attacker, tokens: Packed, distort: Distortion, batch_size: int, generator: torch.Generator
) -> Tensor:
    """(n, C, H, W) images in [0, 1] from the tokens of n images, one draw of the noise each."""
    device = next(attacker.parameters()).device
    # The kernels it was trained with: attention has others for evaluation, which round differently.
    attacker.train()
    with torch.inference_mode():
        received = receive_batches(tokens, distort, batch_size, generator, device)
        return torch.cat([attacker(part).clamp(0, 1).cpu() for part in received])
