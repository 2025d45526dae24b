"""What a dense model makes of pictures: maps of logits, against masks where there are any, and against its own maps.

Scores are an image's own: the intersection over union of what the map says (above one half) with the mask; the mean
absolute error; the F-measure with beta^2 = 0.3, which saliency is commonly reported with (Achanta et al., CVPR 2009).
Fidelity to the unmerged map, for which no mask is needed: correlation, mean absolute difference, and the mean over
pixels of the divergence of the two Bernoulli distributions.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

BETA2 = 0.3


def score_maps(logits: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """(n,) each of score (IoU), mae and f_measure of (n, H, W) maps against masks.

    >>> logits, masks = torch.tensor([[[9.0, 9.0, -9.0, -9.0]]]), torch.tensor([[[True, False, False, False]]])
    >>> {name: round(value.item(), 3) for name, value in score_maps(logits, masks).items()}
    {'score': 0.5, 'mae': 0.25, 'f_measure': 0.565}
    """
    said = logits > 0
    both = (said & masks).sum((1, 2)).double()
    precision, recall = both / said.sum((1, 2)).clamp(min=1), both / masks.sum((1, 2)).clamp(min=1)
    weighted = (BETA2 * precision + recall).clamp(min=1e-12)
    return {
        "score": overlap(said, masks),
        "mae": (logits.double().sigmoid() - masks.double()).abs().mean((1, 2)),
        "f_measure": (1 + BETA2) * precision * recall / weighted,
    }


def overlap(said: Tensor, masks: Tensor) -> Tensor:
    """(n,) intersection over union of (n, H, W) bool maps; 1 where both are empty.

    >>> overlap(torch.tensor([[[True, True, False]]]), torch.tensor([[[True, False, False]]]))
    tensor([0.5000], dtype=torch.float64)
    """
    both, either = (said & masks).sum((1, 2)).double(), (said | masks).sum((1, 2)).double()
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def compare_maps(logits: Tensor, reference: Tensor) -> dict[str, Tensor]:
    """What (n, H, W) maps differ in from those of the unmerged model: (n,) each.

    kl; margin_kl, in which pixels count the more the nearer the unmerged map is to one half; disagreement, the share
    of pixels on the other side of one half; correlation; difference (mean absolute).

    >>> one = torch.tensor([[[0.0, 2.0]]])
    >>> {name: round(value.item(), 4) for name, value in compare_maps(one, one).items()}
    {'kl': 0.0, 'margin_kl': 0.0, 'disagreement': 0.0, 'correlation': 1.0, 'difference': 0.0}
    """
    given, true = logits.double().flatten(1), reference.double().flatten(1)
    p, q = true.sigmoid(), given.sigmoid()
    kl = p * (F.logsigmoid(true) - F.logsigmoid(given)) + (1 - p) * (F.logsigmoid(-true) - F.logsigmoid(-given))
    doubt = 1 - (2 * p - 1).abs()
    a, b = (part - part.mean(1, keepdim=True) for part in (p, q))
    return {
        "kl": kl.mean(1),
        "margin_kl": (kl * doubt).sum(1) / doubt.sum(1).clamp(min=1e-12),
        "disagreement": ((given > 0) != (true > 0)).double().mean(1),
        "correlation": (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-12),
        "difference": (p - q).abs().mean(1),
    }
