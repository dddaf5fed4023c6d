"""What a student is told about the videos that it makes: two losses on a block of its latents.

Both know the flow as a generator sees it that is shown the student's past, with a little noise on it: what has drifted
is pulled back to what the teacher, who was trained on pasts under noise, knows.
"""

from itertools import pairwise

import torch
from torch import Tensor

from demo.training.clips import BLOCK
from demo.training.generator import SHIFT, new_rope, random_sigma
from demo.training.rollout import Tape, Videos, new_cache
from pipeline.sampler import shifted_sigma
from wan.model import CausalWan

GUIDANCE = 2.5
TEACHER_STEPS = 8  # from pure noise; fewer from less
BLUR = 0.1  # σ of the noise on the past
SOFT = 0.1  # where the loss goes over from square to absolute
CRITIC_DRAWS = 2  # noise levels at which the critic sees each block of the student's
LEAST, MOST = 0.02, 0.98  # σ before the shift at which two distributions are compared


class Score:
    """The flow of noisy latents after the past of somebody else's videos. copies: of each sample, one after another."""

    copies = 1

    def __init__(self, model: CausalWan, batch: int, dtype: torch.dtype):
        self.model, self.device = model, model.patch_embedding.weight.device.type
        self.rope, self.cache = new_rope(self.device), new_cache(self.copies * batch, self.device, dtype)

    @torch.no_grad()
    def see(self, past: Tensor, embeds: Tensor) -> None:
        """Fills the cache. past: the clean blocks that the student's holds [n, B, F, 16, h, w]. embeds [B, n, dim]."""
        self.text = self.model.encode_text(embeds)
        self.cache.rewind(keep_sink=False)
        for block, latents in enumerate(past):
            self._begin(block)
            shown = (1 - BLUR) * latents + BLUR * torch.randn_like(latents)
            self._flow(shown, torch.full_like(latents[:, 0, 0, 0, 0], BLUR), want_flow=False)
        self._begin(len(past))

    @torch.no_grad()
    def flow(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x [B, F, 16, h, w] at σ [B] → [copies·B, F, 16, h, w]."""
        return self._flow(x, sigma)

    def _begin(self, block: int) -> None:
        self.cache.begin(BLOCK * block, BLOCK)
        self.turns = self.rope.turns(BLOCK * block, BLOCK)

    def _flow(self, x: Tensor, sigma: Tensor, want_flow: bool = True) -> Tensor | None:
        times = timesteps_of(sigma, x).repeat(self.copies, 1)
        return self.model.flow(x.repeat(self.copies, 1, 1, 1, 1), times, self.turns, self.cache, self.text, want_flow)


class Teacher(Score):
    """The guided flow of a generator that stays as it is."""

    copies = 2  # told the prompt, and not

    def __init__(self, model: CausalWan, nothing: Tensor, batch: int, dtype: torch.dtype):
        super().__init__(model.to(dtype).requires_grad_(False), batch, dtype)
        self.nothing = nothing

    def see(self, past: Tensor, embeds: Tensor) -> None:
        super().see(past, torch.cat([embeds, self.nothing.expand_as(embeds)]))

    def flow(self, x: Tensor, sigma: Tensor) -> Tensor:
        told, untold = super().flow(x, sigma).chunk(2)
        return untold + GUIDANCE * (told - untold)

    def endpoint(self, x: Tensor, sigma: float) -> Tensor:
        """Where the flow leads from x at σ: x0, by many small steps."""
        s = sigma / (SHIFT - (SHIFT - 1) * sigma)  # before the shift
        count = max(3, round(TEACHER_STEPS * s))
        sigmas = [shifted_sigma(s * (1 - i / count), SHIFT) for i in range(count + 1)]
        for here, there in pairwise(sigmas):
            x = x - (here - there) * self.flow(x, torch.full_like(x[:, 0, 0, 0, 0], here))
        return x


class Critic(Score):
    """The flow of a generator that learns what the student makes. model: a copy of `trained` to compute with."""

    def __init__(self, model: CausalWan, trained: CausalWan, batch: int, dtype: torch.dtype):
        super().__init__(model.to(dtype).requires_grad_(False), batch, dtype)
        self.trained = trained

    @torch.no_grad()
    def refresh(self) -> None:
        """Computes with the weights as they are trained by now."""
        torch._foreach_copy_(list(self.model.parameters()), list(self.trained.parameters()))

    def learn(self, x0: Tensor, embeds: Tensor) -> Tensor:
        """Mean squared error of its flow towards the student's latents x0, after the past that it has seen."""
        losses = []
        for _ in range(CRITIC_DRAWS):
            sigma, noise = random_sigma((len(x0),), x0.device), torch.randn_like(x0)
            x = noisy(x0, noise, sigma)
            with torch.autocast(self.device, torch.bfloat16, enabled=self.device != "cpu", cache_enabled=False):
                text = self.trained.encode_text(embeds)
                flow = self.trained.flow(x, timesteps_of(sigma, x), self.turns, Tape(self.cache), text)
            losses.append((flow.float() - (noise - x0)).square().mean())
        return sum(losses) / len(losses)


class Following:
    """The student is to be where the teacher gets to from the same latents.

    So it learns to do in one step what takes the teacher many. Where that leads to different places from almost the
    same latents, it learns their mean.
    """

    def __init__(self, teacher: Teacher):
        self.teacher = teacher

    def __call__(self, videos: Videos, x: Tensor, sigma: float, x0: Tensor) -> dict[str, Tensor]:
        """Losses of the student's x0 [B, F, 16, h, w], which it made of x at σ, after the past of `videos`."""
        self.teacher.see(videos.past(), videos.embeds)
        error = x0 - self.teacher.endpoint(x, sigma)
        return {"loss": ((error.square() + SOFT**2).sqrt() - SOFT).mean()}


class Matching:
    """What the student makes is to be distributed as what the teacher makes (Yin et al. 2024, DMD2, arXiv:2405.14867).

    It is moved to where the teacher's flow leads from any noise, compared to that of a critic who knows the student.
    """

    def __init__(self, teacher: Teacher, critic: Critic):
        self.teacher, self.critic = teacher, critic

    def __call__(self, videos: Videos, x: Tensor, sigma: float, x0: Tensor) -> dict[str, Tensor]:
        """Losses of the student's x0, and of the critic."""
        for score in (self.teacher, self.critic):
            score.see(videos.past(), videos.embeds)
        with torch.no_grad():
            s = LEAST + (MOST - LEAST) * torch.rand(len(x0), device=x0.device)
            level = shifted_sigma(s, SHIFT)
            wide = level[:, None, None, None, None]
            seen = noisy(x0, torch.randn_like(x0), level)
            real, fake = (seen - wide * score.flow(seen, level) for score in (self.teacher, self.critic))
            away = (fake - real) / (x0 - real).abs().mean((1, 2, 3, 4), keepdim=True)
        loss = (x0 - (x0.detach() - away)).square().mean() / 2
        return {"loss": loss, "critic": self.critic.learn(x0.detach(), videos.embeds)}


def timesteps_of(sigma: Tensor, x: Tensor) -> Tensor:
    """σ [B] as the timesteps of latents x [B, F, …]: [B, F]."""
    return 1000 * sigma.double()[:, None].expand(-1, x.shape[1])


def noisy(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x0 [B, F, 16, h, w] under noise at σ [B]."""
    sigma = sigma[:, None, None, None, None]
    return (1 - sigma) * x0 + sigma * noise
