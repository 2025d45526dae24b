"""The judge: a classifier that no attacker has seen, which says what a reconstruction gives away."""

from collections.abc import Mapping
from itertools import pairwise

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import Normalize, Resize

from tokmerge.evaluation.outcomes import decide
from tokmerge.models import zoo
from tokmerge.models.training import adamw, train


class Judge(nn.Module):
    """A small convolutional classifier of (B, C, H, W) images in [0, 1], unlike what attacks and what is attacked."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        widths = (channels, 32, 32, 64, 64, 96)
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(pairwise(widths)):
            layers += [nn.Conv2d(before, after, 3, 1 + index % 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(widths[-1], classes)

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> "Judge":
        """A trained one from its state_dict, ready to evaluate."""
        judge = cls(weights["body.0.weight"].shape[1], len(weights["head.bias"]))
        judge.load_state_dict(weights)
        return judge.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Class scores (B, classes)."""
        return self.head(self.body(images - 0.5).mean((2, 3)))


def train_judge(
    judge: Judge, images: Tensor, labels: Tensor, *, epochs: float, batch_size: int, lr: float, seed: int,
    description: str | None = None,
) -> Judge:  # fmt: skip
    """Train a judge in place on (n, C, H, W) uint8 images with (n,) int64 labels, mirrored and shifted at random.

    AdamW's rate is one cycle; the seed draws batches, mirrors and shifts; None for a description is no progress bar.
    """
    generator, n, device = torch.Generator().manual_seed(seed), len(images), next(judge.parameters()).device

    def loss(step: int) -> Tensor:
        rows = torch.randint(n, (batch_size,), generator=generator)
        batch = images[rows].float() / 255
        if torch.rand(1, generator=generator) < 0.5:
            batch = batch.flip(3)
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        scores = judge(batch.roll(shift, (2, 3)).to(device))
        return F.cross_entropy(scores, labels[rows].to(device), label_smoothing=0.05)

    steps = max(2, round(epochs * n / batch_size))
    train(judge, loss, adamw(judge, lr, steps, weight_decay=0.05), steps, description=description)
    return judge


def timm_judge(name: str, device: str | torch.device) -> nn.Module:
    """A pretrained model of images in [0, 1] of any size, for data that it knows."""
    model = zoo.load_model(name)
    config = resolve_model_data_config(model)
    size = Resize(config["input_size"][1:])
    return nn.Sequential(size, Normalize(config["mean"], config["std"]), model).eval().to(device)


def classify(judge: nn.Module, images: Tensor, batch_size: int = 256) -> Tensor:
    """What a judge says of (n, C, H, W) images in [0, 1], as `decide` gives it, on the CPU."""
    device = next(judge.parameters()).device
    with torch.inference_mode():
        return torch.cat([decide(judge(batch.to(device))).cpu() for batch in images.split(batch_size)])
