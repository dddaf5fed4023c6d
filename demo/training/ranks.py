"""Training on several GPUs of a machine, `torchrun --nproc-per-node 2 -m demo.train …`: each has clips of its own, and
their gradients are averaged. Without torchrun there is one, and nothing to do."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

WAIT = timedelta(hours=1)  # for the first one, which trains the witness alone


class Ranks:
    """This process among those that train together."""

    def __init__(self):
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        if self.size > 1:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl", timeout=WAIT)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def average_gradients(self, parameters: list[Tensor]) -> None:
        if self.size > 1:
            gradients = [p.grad for p in parameters if p.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            flat /= self.size
            torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in zip(
                flat.split([gradient.numel() for gradient in gradients]), gradients, strict=True)])

    def share(self, module: torch.nn.Module) -> None:
        """Gives all the first one's weights."""
        if self.size > 1:
            for value in module.parameters():
                dist.broadcast(value.data, 0)

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()
