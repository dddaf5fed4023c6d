"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) over three axes, split as in Wan 2.1."""

import torch
from torch import Tensor


def _angular_speeds(pairs: int, device) -> Tensor:
    """ω_j = 10000^(−j/pairs), j = 0…pairs−1, in float64."""
    return 10000.0 ** (-torch.arange(pairs, dtype=torch.float64, device=device) / pairs)


def frame_pairs(head_dim: int) -> int:
    """How many of a head's pairs turn with the frame; they come first, those of row and column share the others."""
    return head_dim // 2 - 2 * (head_dim // 2 // 3)


class RotaryEmbedding:
    """Turns for the tokens of one video: adjacent pairs of a head's channels are complex numbers that turn with the
    token's frame, row and column.

    Angles are computed in float64 for any frame index; there is no table that ends.
    """

    def __init__(self, head_dim: int, rows: int, columns: int, device):
        self.frame_speeds = _angular_speeds(frame_pairs(head_dim), device)
        speeds = _angular_speeds(head_dim // 2 // 3, device)
        row = torch.outer(torch.arange(rows, dtype=torch.float64, device=device), speeds)
        column = torch.outer(torch.arange(columns, dtype=torch.float64, device=device), speeds)
        self.spatial = torch.cat([row[:, None].expand(-1, columns, -1), column.expand(rows, -1, -1)], -1).flatten(0, 1)

    def turns(self, position: int, frames: int) -> Tensor:
        """Unit complex numbers [frames·rows·columns, head_dim/2] for the latents `position … position+frames−1`."""
        frame = torch.arange(position, position + frames, dtype=torch.float64, device=self.spatial.device)
        frame = torch.outer(frame, self.frame_speeds)[:, None].expand(-1, len(self.spatial), -1)
        angles = torch.cat([frame, self.spatial.expand(frames, -1, -1)], -1).flatten(0, 1)
        return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)

    def shift(self, latents: int) -> Tensor:
        """Unit complex numbers [1, head_dim/2] that move a token `latents` further along the frame axis."""
        angles = torch.zeros(1, len(self.frame_speeds) + self.spatial.shape[-1], dtype=torch.float64,
                             device=self.spatial.device)
        angles[:, : len(self.frame_speeds)] = latents * self.frame_speeds
        return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """x [B, tokens, H, D] turned by `turns` [tokens or 1, D/2]; computed in float32, returned in x's dtype."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2).type_as(x)
