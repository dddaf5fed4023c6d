from torch import Tensor, nn

from wan.kernels import norm_silu
from wan.kernels.conv import conv3d, conv3d_of_ring, reads_rings


class CausalConv3d(nn.Conv3d):
    """A convolution over frames that lie channels-last, [B, T, H, W, C], and over frames of the past. It says how the
    frames that it reads are kept, and writes them: `wan.vae` has their order."""

    def room(self, x: Tensor, frames: int) -> Tensor:
        """Memory for so many frames of what is made of x [B, any, H, W, C]."""
        batch, _, *sizes = x.shape
        return x.new_empty(batch, frames, *sizes)

    def write(self, x: Tensor, norm: nn.Module | None, bias: Tensor | None, out: Tensor) -> None:
        """out ← x, or SiLU(norm(x + bias)). x [B, T, H, W, C]; out: T frames of `room`."""
        if norm is None:
            out.copy_(x)
        else:
            norm_silu(x, norm.gamma.flatten(), bias, out)

    def reads_rings(self, x: Tensor) -> bool:
        """Whether its frames may lie in a ring, where the first follows the last."""
        return reads_rings(x, self.weight)

    def forward(self, frames: Tensor, bias: Tensor | None, skip: Tensor | None = None) -> Tensor:
        """Convolution of all `frames` [B, T, …], plus bias [C'] and skip → [B, T−kt+1, H, W, C']. Where there is a
        skip, there must be a bias."""
        return conv3d(frames, self.weight, bias, skip)

    def of_ring(self, ring: Tensor, start: int, frames: int, bias: Tensor | None, skip: Tensor | None) -> Tensor:
        """The same of so many frames of a ring, from `start` on."""
        return conv3d_of_ring(ring, start, frames, self.weight, bias, skip)
