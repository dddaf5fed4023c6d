import numpy as np
import torch
from torch import Tensor

from utils.device import upload


class NoiseSource:
    """Gaussian noise of one video, from (seed, sample, block, step) alone.

    Counter-based (Philox, Salmon et al. 2011) and drawn on the CPU, so that the numbers do not depend on the device,
    on the video's length, on its neighbours or on how many were drawn before.

    shape: of one block without the batch, [F, C, h, w]. `start` and `renoise` return float32 [1, F, C, h, w].
    """

    batch = 1  # videos whose noise is drawn

    def __init__(self, seed: int, shape: tuple[int, ...], sample: int = 0, device: torch.device | str = "cpu"):
        self.seed, self.sample, self.shape, self.device = seed, sample, shape, torch.device(device)

    def start(self, block: int) -> Tensor:
        """The noise that a block is denoised from."""
        return self._draw(block, 0)

    def renoise(self, block: int, step: int) -> Tensor:
        """The noise that is added back after denoising step `step` of a block."""
        return self._draw(block, 1 + step)

    def _draw(self, block: int, index: int) -> Tensor:
        # The low half of the 256-bit counter runs while numbers are drawn; block and index fill the high half.
        bits = np.random.Philox(key=[self.seed, self.sample], counter=[0, 0, index, block])
        noise = torch.from_numpy(np.random.Generator(bits).standard_normal(self.shape, dtype=np.float32))[None]
        return upload(noise, self.device)
