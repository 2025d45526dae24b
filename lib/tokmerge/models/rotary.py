"""Rotary positions of merged tokens: anywhere in the patch grid, not only where patches are."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokmerge.merging.packed import Packed


@dataclass(frozen=True)
class Rotary:
    """Angles that grow linearly along rows and columns, as in every rotary embedding of images."""

    start: Tensor  #: (H or 1, d) angles at row 0 and column 0
    down: Tensor  #: (H or 1, d) from one row to the next
    right: Tensor  #: (H or 1, d) from one column to the next

    @classmethod
    def of(cls, sin: Tensor, cos: Tensor, grid: tuple[int, int]) -> "Rotary":
        """Read off a table of the patches of a grid, row by row: (N, H or 1, d) sines and cosines.

        Raises:
            ValueError: the angles are not linear in row and column, or too steep to be read off.
        """
        rows, columns = grid
        angles = torch.atan2(sin.double(), cos.double())
        down = _wrapped(angles[columns] - angles[0]) if rows > 1 else torch.zeros_like(angles[0])
        right = _wrapped(angles[1] - angles[0]) if columns > 1 else torch.zeros_like(angles[0])
        made = cls(angles[0], down, right)
        patch = torch.arange(rows * columns, device=sin.device)
        again = made.angles(torch.stack([patch // columns, patch % columns], dim=1))
        slack = 0.01 if sin.dtype.itemsize < 4 else 1e-4
        if not (_wrapped(again - angles).abs() <= slack).all():
            raise ValueError("the model's rotary positions are not linear in row and column: they cannot be averaged")
        return cls(*(part.float() for part in (made.start, made.down, made.right)))

    def angles(self, place: Tensor) -> Tensor:
        """(T, H or 1, d) angles at (T, 2) rows and columns."""
        row, column = place.to(self.start.dtype)[:, :, None, None].unbind(1)
        return self.start + row * self.down + column * self.right

    def __call__(self, tokens: Packed, protected: int) -> tuple[Tensor, Tensor]:
        """(T, H or 1, d) sines and cosines for tokens; the first ``protected`` of each image are not turned."""
        assert tokens.place is not None
        turned = (tokens.layout.position >= protected)[:, None, None]
        angles = self.angles(tokens.place) * turned
        return angles.sin(), angles.cos()


def _wrapped(angle: Tensor) -> Tensor:
    """An angle between -pi and pi."""
    return (angle + math.pi) % (2 * math.pi) - math.pi
