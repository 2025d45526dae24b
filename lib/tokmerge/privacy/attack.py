"""One attack from end to end: intercept, train, rebuild, measure; a `Target` is what all attacks on a model share."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms.functional import resize

from tokmerge.data import image_sets
from tokmerge.data.registry import load_images
from tokmerge.data.scenes import PHOTO
from tokmerge.evaluation.inputs import Inputs
from tokmerge.evaluation.outcomes import agreement, decide
from tokmerge.io import paths
from tokmerge.io.cache import Cache
from tokmerge.merging.matching import Policy
from tokmerge.merging.packed import Packed
from tokmerge.models import zoo
from tokmerge.models.patching import patch
from tokmerge.models.vision_tower import patch_tower
from tokmerge.privacy import decoder, leakage
from tokmerge.privacy.defence import Defence, collect_tokens, serve
from tokmerge.privacy.judge import classify

# The first test images, whose distance in the model's features is measured.
N_DISTANCE = 256


class Reconstruction(NamedTuple):
    """What one attacker got."""

    table: pd.DataFrame  #: one row per test image, a column per metric
    curve: pd.DataFrame  #: step, images, loss on held-out images
    rebuilt: Tensor  #: (n, C, H, W) in [0, 1]; from a cache uint8

    @classmethod
    def cached(cls, cache: Cache, piece: str, make: Callable[[], "Reconstruction"], n_shown: int) -> "Reconstruction":
        """What ``make`` gives, its first ``n_shown`` pictures as uint8: made once, and read from then on."""
        made = functools.cache(make)
        curve = cache.table(f"{piece} curve", lambda: made().curve)
        rebuilt = cache.tensors(piece, lambda: {"rebuilt": to_uint8(made().rebuilt[:n_shown])})
        return cls(cache.table(piece, lambda: made().table), curve, rebuilt["rebuilt"])


@dataclass
class Target:
    """A model under attack."""

    #: (policy, split layer) to a function from normalised images to the tokens sent, with their source map
    edge: Callable[[Policy | None, int | None], Callable[[Tensor], Packed]]
    mean: Tensor  #: (C,) normalisation the model expects
    std: Tensor  #: (C,)
    device: torch.device | str  #: where the model is
    prefix: int  #: leading tokens that stand for no patch
    public: Tensor  #: (n, C, H, W) uint8, images the attacker has
    test: Tensor  #: (m, C, H, W) uint8, images it wants
    groups: Tensor  #: (m,) within which originals are looked for
    #: the first k test images, rebuilt, (k, C, H, W) in [0, 1], to (k,) shares of right answers of the judge
    hits: Callable[[Tensor], Tensor]
    features: Callable[[Tensor], Tensor]  #: (B, C, H, W) normalised images to (B, d) features of the model
    batch_size: int  #: images at a time, outside training
    #: (tokens, defence, split layer, seed) to (m,) scores of the server and (m,) bytes; None: no server is asked
    serve: Callable[[Packed, Defence, int | None, int], tuple[Tensor, Tensor]] | None = None
    side: int | None = None  #: pixels a side of what attackers rebuild; None for those of the images
    _tokens: dict[Any, tuple[Packed, ...]] = field(default_factory=dict)

    @property
    def originals(self) -> Tensor:
        """(m, C, H, W) the test images in [0, 1], as large as what attackers rebuild."""
        return self.reduce(self.test).float() / 255

    def reduce(self, images: Tensor) -> Tensor:
        """(n, C, H, W) uint8 images as large as what attackers rebuild."""
        return images if self.side is None else resize(images, [self.side] * 2)

    def judge_accuracy(self) -> float:
        """The judge's accuracy on the test images themselves; ValueError if it is 0: nothing is relative to that."""
        accuracy = self.hits(self.originals).mean().item()
        if accuracy == 0:
            raise ValueError("the judge is right on none of the test images: train it longer")
        return accuracy

    def normalise(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as the model takes them, of its own size, where it is."""
        if images.shape[-2:] != self.test.shape[-2:]:
            images = resize(images, list(self.test.shape[-2:]))
        return ((images - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)).to(self.device)

    def tokens(self, defence: Defence, split_layer: int | None = None) -> tuple[Packed, ...]:
        """Tokens of the public and of the test images; those of the last policy are kept."""
        key = (defence.policy, split_layer)
        if key not in self._tokens:
            self._tokens.clear()
            edge = self.edge(*key)
            self._tokens[key] = tuple(
                collect_tokens(lambda part: edge(self.normalise(part.float() / 255)), images, self.batch_size)
                for images in (self.public, self.test)
            )
        return self._tokens[key]

    def attack(
        self, kind: str, defence: Defence, *, split_layer: int | None = None, seed: int = 0, width: int = 48,
        **training: Any,
    ) -> Reconstruction:  # fmt: skip
        """Train one attacker against one defence and let it rebuild the test images.

        Args:
            kind, width: of attacker, one of `tokmerge.privacy.decoder.ATTACKERS`.
            defence, split_layer: what it meets, in training as well, and where, as in `tokmerge.patch`.
            seed: of its weights, its batches and the noise.
            **training: of `tokmerge.privacy.decoder.train_attacker`.
        """
        public, test = self.tokens(defence, split_layer)
        assert public.source is not None
        torch.manual_seed(seed)
        shape: Any = tuple(self.originals.shape[1:])
        attacker = decoder.Attacker(kind, public.x.shape[1], public.source.shape[1], self.prefix, shape, width)
        attacker.to("cuda" if torch.cuda.is_available() else "cpu")
        images = self.reduce(self.public)
        curve = decoder.train_attacker(attacker, public, images, defence.receive, seed=seed, **training)
        generator = torch.Generator().manual_seed(seed + 1)
        rebuilt = decoder.reconstruct(attacker, test, defence.receive, self.batch_size, generator)
        return Reconstruction(self.measure(rebuilt, test, defence, split_layer, seed), curve, rebuilt)

    def measure(
        self, rebuilt: Tensor, tokens: Packed, defence: Defence, split_layer: int | None, seed: int
    ) -> pd.DataFrame:
        """One row per test image: all of `tokmerge.privacy.leakage`, tokens, and what the server made of them."""
        images = self.originals
        table = leakage.similarity(images, rebuilt)
        first, second = (self.normalise(part[:N_DISTANCE]) for part in (images, rebuilt))
        distance = leakage.feature_distance(self.features, first, second, self.batch_size)
        table["distance"] = pd.Series(distance.cpu().numpy())
        table["hit"] = self.hits(rebuilt).numpy()
        table["relative"] = table.hit / self.judge_accuracy()
        table = table.join(leakage.reidentify(images, rebuilt, self.groups))
        table["tokens"] = tokens.lengths.numpy()
        if self.serve is not None:
            hit, sent = self.serve(tokens, defence, split_layer, seed + 1)
            table["server_hit"], table["bytes"] = hit.float().numpy(), sent.numpy()
        return table


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8."""
    return (images * 255).round().byte()


def unnormalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(n, C, H, W) as a model takes them to uint8."""
    return to_uint8((images * std.view(-1, 1, 1) + mean.view(-1, 1, 1)).clamp(0, 1))


def normalisation(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of what a timm model expects."""
    config = resolve_model_data_config(model)
    return torch.tensor(config["mean"]), torch.tensor(config["std"])


def classifier_target(
    inputs: Inputs, public_source: str, n_public: int, n_test: int | None, batch_size: int, judge: nn.Module,
    seed: int = 0, side: int | None = None,
) -> Target:  # fmt: skip
    """The model of notebook 10_inputs under attack, its public images drawn as in `public_images`.

    Args:
        inputs: what 10_inputs settled on.
        public_source, n_public, seed: split of the same data that public images come from; how many; of their draw.
        n_test: the first of the test images; None for all.
        judge: (B, C, H, W) in [0, 1] to class scores, or to logits of maps.
        batch_size, side: as in `Target`.
    """
    model = inputs.model
    assert isinstance(model, timm.models.VisionTransformer)
    mean, std = normalisation(model)
    test = inputs.batch("test", n_test)
    public, _ = public_images(inputs, public_source, n_public, seed)
    plain = patch(model, None)

    def edge(policy: Policy | None, split_layer: int | None) -> Callable[[Tensor], Packed]:
        return functools.partial(patch(model, policy, split_layer=split_layer).edge, source=True)

    def answer(tokens: Packed, defence: Defence, split_layer: int | None, seed: int) -> tuple[Tensor, Tensor]:
        merged = patch(model, defence.policy, precision=defence.precision, split_layer=split_layer)
        logits, n_bytes = serve(merged, tokens, defence, batch_size, seed)
        return agreement(decide(logits), test.truth), n_bytes

    def class_token(images: Tensor) -> Tensor:
        packed = plain.features(images)
        return packed.x[packed.layout.offsets]

    def hits(images: Tensor) -> Tensor:
        return agreement(classify(judge, images), test.truth[: len(images)]).float()

    return Target(
        edge, mean, std, inputs.device, model.num_prefix_tokens, unnormalise(public, mean, std),
        unnormalise(test.images, mean, std), test.labels, hits, class_token, batch_size, answer, side,
    )  # fmt: skip


def public_images(inputs: Inputs, source: str, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (n, C, H, W), as the model takes them, and labels (n,) that are in none of search, select and test.

    Raises:
        ValueError: the split has not enough of them.
    """
    given = inputs.facts["params"]
    images = load_images(given["dataset"], source, path=given["data_path"], data_dir=paths.data())
    taken = set(inputs.splits.id[inputs.splits.split != "train"])
    free = [position for position, identifier in enumerate(images.ids) if identifier not in taken]
    if len(free) < n:
        raise ValueError(f"{images.name}, {source}, has {len(free)} images besides search, select and test, not {n}")
    chosen = np.random.default_rng(seed).permutation(free)[:n]
    batch = image_sets.tensors(image_sets.subset(images, chosen), zoo.transform(inputs.model))
    assert not taken & set(batch.ids)
    # A subset is in the set's own order, which may be by class.
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return batch.images[order], batch.labels[order]


def tower_target(
    vision: Any, layer: int, public: Tensor, test: Tensor, mean: Tensor, std: Tensor, hits: Callable[[Tensor], Tensor],
    batch_size: int,
) -> Target:  # fmt: skip
    """A LLaVA's vision tower under attack: its chosen hidden layer is what is sent.

    Args:
        vision: transformers' CLIPVisionModel or SiglipVisionModel.
        layer: hidden state that the language model reads, such as -2.
        public, test, mean, std, hits, batch_size: as in `Target`.
    """
    plain, device = patch_tower(vision, None, layer=layer), next(vision.parameters()).device

    def edge(policy: Policy | None, split_layer: int | None) -> Callable[[Tensor], Packed]:
        merged = patch_tower(vision, policy, layer=layer)
        return lambda images: merged(images, source=True)[0]

    def mean_token(images: Tensor) -> Tensor:
        packed = plain(images)[0]
        return packed.layout.pad(packed.x).mean(1)

    # Any scene may be the original.
    groups = torch.zeros(len(test), dtype=torch.long)
    return Target(edge, mean, std, device, 0, public, test, groups, hits, mean_token, batch_size)


def scene_hits(judge: nn.Module, kinds: np.ndarray) -> Callable[[Tensor], Tensor]:
    """`Target.hits` for scenes: a judge of single photos (B, 1, 28, 28) classifies every cell that shows one.

    Kinds are those of `tokmerge.data.scenes.Scenes`, (n, 9).
    """

    def hits(images: Tensor) -> Tensor:
        grey = images.mean(1, keepdim=True)
        cells = grey.unfold(2, PHOTO, PHOTO).unfold(3, PHOTO, PHOTO).flatten(2, 3).transpose(1, 2).flatten(0, 1)
        known = torch.from_numpy(kinds[: len(images)])
        filled = known >= 0
        right = torch.zeros(filled.shape)
        right[filled] = (classify(judge, cells[filled.flatten()]) == known[filled]).float()
        return right.sum(1) / filled.sum(1)

    return hits
