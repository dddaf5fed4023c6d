"""How latents map to pixels and frames: 8×8 pixels and 4 frames a latent; the first latent of a video gives 1 frame."""

import math

PIXELS = 8  # side of the square of pixels that one latent position covers
FRAMES = 4  # frames that each latent after the first decodes to


def frames_of(latents: int) -> int:
    """Frames that `latents` latents decode to: 4·latents − 3."""
    return FRAMES * (latents - 1) + 1 if latents else 0


def first_frame(latent: int) -> int:
    """Index of the first frame that latent number `latent` decodes to."""
    return frames_of(latent)


def latents_for(frames: int) -> int:
    """The fewest latents that decode to at least `frames` frames."""
    return math.ceil((frames - 1) / FRAMES) + 1


def whole_blocks(latents: int, block: int) -> int:
    """`latents` rounded up to a multiple of `block`."""
    return math.ceil(latents / block) * block
