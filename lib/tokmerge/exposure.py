"""One attack from end to end: intercept, train, rebuild, measure; a `Setting` is what all attacks on a model share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms import Normalize

from tokmerge import attackers, data, leakage, models, paths
from tokmerge.clip import patch as patch_tower
from tokmerge.packed import Packed
from tokmerge.privacy import Defence, collect, listen, serve
from tokmerge.scenes import PHOTO
from tokmerge.vit import patch


class Attack(NamedTuple):
    """What one attacker got.

    Attributes:
        table: one row per test image, a column per metric.
        curve: step, images, loss on held-out images.
        rebuilt: (n, C, H, W) in [0, 1].
    """

    table: pd.DataFrame
    curve: pd.DataFrame
    rebuilt: Tensor


@dataclass
class Setting:
    """A model under attack.

    Attributes:
        listen: (defence, split layer) to a function from normalised images to the tokens sent.
        mean, std: (C,) normalisation the model expects.
        prefix: leading tokens that stand for no patch.
        public: (n, C, H, W) uint8, images the attacker has.
        test: (m, C, H, W) uint8, images it wants.
        groups: (m,) within which originals are looked for.
        hits: the first k test images, rebuilt, (k, C, H, W) in [0, 1], to (k,) shares of right answers of the judge.
        features: (B, C, H, W) images in [0, 1] to (B, d) features of the model under attack.
        serve: (tokens, defence, split layer, seed) to (m,) right answers of the server and (m,) payload bytes;
            None where no server is asked.
        batch_size: images at a time, outside training.
        n_distance: the first test images, whose distance in features is measured.
    """

    listen: Callable[[Defence, int | None], Callable[[Tensor], Packed]]
    mean: Tensor
    std: Tensor
    prefix: int
    public: Tensor
    test: Tensor
    groups: Tensor
    hits: Callable[[Tensor], Tensor]
    features: Callable[[Tensor], Tensor]
    serve: Callable[[Packed, Defence, int | None, int], tuple[Tensor, Tensor]] | None = None
    batch_size: int = 64
    n_distance: int = 256
    _heard: dict[Any, tuple[Packed, Packed]] = field(default_factory=dict)

    def images(self) -> Tensor:
        """(m, C, H, W) the test images in [0, 1]."""
        return self.test.float() / 255

    def clean(self) -> float:
        """The judge's accuracy on the test images themselves.

        Raises:
            ValueError: it is never right, and nothing can be relative to that.
        """
        accuracy = self.hits(self.images()).mean().item()
        if accuracy == 0:
            raise ValueError("the judge is right on none of the test images: teach it longer")
        return accuracy

    def normalise(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as the model takes them."""
        mean, std = (part.view(-1, 1, 1).to(images.device) for part in (self.mean, self.std))
        return (images - mean) / std

    def heard(self, defence: Defence, split_layer: int | None = None) -> tuple[Packed, Packed]:
        """Tokens of the public and of the test images; those of the last policy are kept."""
        key = (defence.method, defence.values, defence.feature, split_layer)
        if key not in self._heard:
            self._heard.clear()
            hear = self.listen(defence, split_layer)
            self._heard[key] = tuple(  # type: ignore[assignment]
                collect(lambda part: hear(self.normalise(part.float() / 255)), images, self.batch_size)
                for images in (self.public, self.test)
            )
        return self._heard[key]

    def attack(
        self, kind: str, defence: Defence, *, split_layer: int | None = None, seed: int = 0,
        description: str | None = None, width: int = 48, **training: Any,
    ) -> Attack:  # fmt: skip
        """Train one attacker against one defence and let it rebuild the test images.

        Args:
            kind: of attacker, one of `tokmerge.attackers.KINDS`.
            defence: what it meets, in training as well.
            split_layer: as in `tokmerge.patch`.
            seed: of its weights, its batches and the noise.
            description: shown beside the progress bar; None for no bar.
            width: of the attacker.
            **training: steps, batch_size, lr and n_check of `tokmerge.attackers.train`.
        """
        public, test = self.heard(defence, split_layer)
        assert public.source is not None
        torch.manual_seed(seed)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        shape: Any = tuple(self.test.shape[1:])
        attacker = attackers.Attacker(
            kind, public.x.shape[1], public.source.shape[1], self.prefix, shape, width
        ).to(device)  # fmt: skip
        curve = attackers.train(
            attacker, public, self.public, defence.receive, seed=seed, description=description, **training
        )
        draws = torch.Generator().manual_seed(seed + 1)
        rebuilt = attackers.rebuild(attacker, test, defence.receive, self.batch_size, draws)
        return Attack(self.measure(rebuilt, test, defence, split_layer, seed), curve, rebuilt)

    def measure(
        self, rebuilt: Tensor, tokens: Packed, defence: Defence, split_layer: int | None, seed: int
    ) -> pd.DataFrame:
        """One row per test image: all of `tokmerge.leakage`, tokens, and what the server made of them."""
        images = self.images()
        table = leakage.similarity(images, rebuilt)
        few = slice(self.n_distance)
        distance = leakage.feature_distance(self.features, images[few], rebuilt[few], self.batch_size)
        table["distance"] = pd.Series(distance.numpy()).reindex(table.index)
        table["hit"] = self.hits(rebuilt).numpy()
        table["relative"] = table.hit / self.clean()
        table = table.join(leakage.matching(images, rebuilt, self.groups))
        table["tokens"] = tokens.lengths.numpy()
        if self.serve is not None:
            hit, sent = self.serve(tokens, defence, split_layer, seed + 1)
            table["server_hit"], table["bytes"] = hit.float().numpy(), sent.numpy()
        return table


def unnormalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(n, C, H, W) as a model takes them to uint8."""
    return ((images * std.view(-1, 1, 1) + mean.view(-1, 1, 1)).clamp(0, 1) * 255).round().byte()


def classification(
    inputs_dir: str | Path, public_source: str, n_public: int, n_test: int | None, batch_size: int, judge: nn.Module,
    seed: int = 0,
) -> Setting:  # fmt: skip
    """The classifier of notebook 10_inputs under attack.

    Args:
        inputs_dir: what 10_inputs wrote.
        public_source: split of the same data that public images come from.
        n_public: how many; none of them is a search or test image.
        n_test: the first of the test images; None for all.
        batch_size: images at a time, outside training.
        judge: (B, C, H, W) in [0, 1] to class scores.
        seed: of the draw of public images.

    Raises:
        ValueError: not enough public images.
    """
    inputs, splits = models.recorded(inputs_dir)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, _, test_set = models.reload(inputs, splits, device)
    mean, std = normalisation(model)
    transform = models.transform(model)
    test = data.tensors(data.subset(test_set, range(n_test or len(test_set))), transform)
    public, _ = public_images(inputs, splits, public_source, n_public, transform, seed)
    assert isinstance(model, timm.models.VisionTransformer)
    plain = patch(model, None)

    def hear(defence: Defence, split_layer: int | None) -> Callable[[Tensor], Packed]:
        heard = listen(patch(model, defence.policy, split_layer=split_layer))
        return lambda images: heard(images.to(device))

    def answer(tokens: Packed, defence: Defence, split_layer: int | None, seed: int) -> tuple[Tensor, Tensor]:
        merged = patch(model, defence.policy, precision=defence.precision, split_layer=split_layer)
        logits, sent = serve(merged, tokens, defence, batch_size, seed)
        return logits.argmax(1) == test.labels, sent

    def class_features(images: Tensor) -> Tensor:
        packed = plain.features(setting.normalise(images).to(device))
        return packed.x[packed.layout.offsets].cpu()

    def hits(images: Tensor) -> Tensor:
        return (leakage.classify(judge, images) == test.labels[: len(images)]).float()

    setting = Setting(
        hear, mean, std, model.num_prefix_tokens, unnormalise(public, mean, std), unnormalise(test.images, mean, std),
        test.labels, hits, class_features, answer, batch_size,
    )  # fmt: skip
    return setting


def public_images(
    inputs: dict[str, Any], splits: pd.DataFrame, source: str, n: int, transform: Callable[[Any], Tensor], seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Images (n, C, H, W), as the model takes them, and labels (n,) that are in neither search nor test split.

    Raises:
        ValueError: the split has not enough of them.
    """
    given = inputs["params"]
    images = data.load(given["dataset"], source, path=given["data_path"], data_dir=paths.root() / "data")
    taken = set(splits.id)
    free = [position for position, identifier in enumerate(images.ids) if identifier not in taken]
    if len(free) < n:
        raise ValueError(f"{images.name}, {source}, has {len(free)} images besides search and test, not {n}")
    chosen = np.random.default_rng(seed).permutation(free)[:n]
    batch = data.tensors(data.subset(images, chosen), transform)
    assert not taken & set(batch.ids)
    # A subset is in the set's own order, which may be by class.
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return batch.images[order], batch.labels[order]


def normalisation(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of what a timm model expects."""
    config = resolve_model_data_config(model)
    return torch.tensor(config["mean"]), torch.tensor(config["std"])


def timm_judge(name: str, device: str | torch.device) -> nn.Module:
    """A pretrained timm classifier of images in [0, 1], for data that it knows."""
    model = models.load(name)
    mean, std = normalisation(model)
    return nn.Sequential(Normalize(mean.tolist(), std.tolist()), model).eval().to(device)


def tower(
    vision: Any, layer: int, public: Tensor, test: Tensor, mean: Tensor, std: Tensor, hits: Callable[[Tensor], Tensor],
    batch_size: int,
) -> Setting:  # fmt: skip
    """A LLaVA's vision tower under attack: its chosen hidden layer is what is sent.

    Args:
        vision: transformers' CLIPVisionModel or SiglipVisionModel.
        layer: hidden state that the language model reads, such as -2.
        public, test: (n, C, H, W) uint8.
        mean, std: (C,) normalisation.
        hits: as in `Setting`.
        batch_size: images at a time, outside training.
    """
    plain, device = patch_tower(vision, None, layer=layer), next(vision.parameters()).device

    def hear(defence: Defence, split_layer: int | None) -> Callable[[Tensor], Packed]:
        merged = patch_tower(vision, defence.policy, layer=layer)
        return lambda images: merged(images.to(device), source=True)[0]

    def mean_features(images: Tensor) -> Tensor:
        packed = plain(setting.normalise(images).to(device))[0]
        return packed.layout.pad(packed.x).mean(1).cpu()

    groups = torch.zeros(len(test), dtype=torch.long)  # any scene may be the original
    setting = Setting(hear, mean, std, 0, public, test, groups, hits, mean_features, None, batch_size)
    return setting


def scene_hits(judge: nn.Module, kinds: np.ndarray) -> Callable[[Tensor], Tensor]:
    """`Setting.hits` for scenes: the judge, taught on single photos, looks at every cell that shows one.

    Args:
        judge: (B, 1, 28, 28) in [0, 1] to scores of `tokmerge.scenes.KINDS`.
        kinds: (n, 9) kind in each cell, -1 for blank.
    """
    truth = torch.from_numpy(kinds)

    def hits(images: Tensor) -> Tensor:
        grey = images.mean(1, keepdim=True)
        cells = grey.unfold(2, PHOTO, PHOTO).unfold(3, PHOTO, PHOTO).flatten(2, 3).transpose(1, 2).flatten(0, 1)
        known = truth[: len(images)]
        filled = known >= 0
        right = torch.zeros(filled.shape)
        right[filled] = (leakage.classify(judge, cells[filled.flatten()]) == known[filled]).float()
        return right.sum(1) / filled.sum(1)

    return hits
