"""Which settings a session may have of its own, and how far they may go."""

from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils.config import Config, nearest
from utils.errors import UserError

OWN = (
    "denoising_step_list", "warp_denoising_step", "context_noise", "global_sink", "height", "width", "crf",
    "model_kwargs.local_attn_size", "model_kwargs.sink_size", "model_kwargs.timestep_shift",
    "model_kwargs.use_infinite_attention",
)
MOST_STEPS = 8  # denoising steps of a block


def own_config(config: Config, overrides: dict[str, Any]) -> Config:
    """The config of one session: the server's, with `overrides` (numbers, or lists of them, by the config's keys).

    Raises UserError for a key that is not of `OWN`, a wrong value, or one that would take more memory or time than the
    server's own.
    """
    for key in overrides:
        if key not in OWN:
            raise UserError(f"{key} can't be set for one session{nearest(key, list(OWN))}; these can: {', '.join(OWN)}")
    tree = OmegaConf.structured(config)
    for node in (tree, tree.model_kwargs, tree.adapter):
        OmegaConf.set_readonly(node, False)
    try:
        for key, value in overrides.items():
            OmegaConf.update(tree, key, value)
        own = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0]) from None
    if own.height * own.width > config.height * config.width:
        raise UserError(f"{own.height}×{own.width} pixels are more than this server's {config.height}×{config.width}")
    if config.window is not None and (own.window is None or own.window > config.window):
        raise UserError(f"model_kwargs.local_attn_size={own.model_kwargs.local_attn_size} is more than this server's "
                        f"{config.window}")
    if len(own.denoising_step_list) > max(MOST_STEPS, len(config.denoising_step_list)):
        raise UserError(f"denoising_step_list has {len(own.denoising_step_list)} steps, at most {MOST_STEPS} are made")
    return own
