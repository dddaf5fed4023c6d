"""From the results of the stages to a checkpoint in the released layout, and back."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor

from demo.random_checkpoint import transformer_config, write_json
from demo.training import forcing
from demo.training import generator as stage2
from demo.training import vae as vaes
from utils.checkpoint import pick_generator, read, read_folder, read_json
from utils.key_names import lora_modules, tied_embedding

LORA = "models/lora.pt"
TEACHER = "models/teacher.pt"  # only training reads it


def export(folder: Path, target: Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes FOLDER's stages to TARGET: the latest of the generator's, the LoRA and the teacher if they are there."""
    for name in ("transformer", "text_encoder", "tokenizer", "vae", "models"):
        (target / name).mkdir(parents=True, exist_ok=True)
    model, text, words = stage2.load(folder, "cpu", stage2.latest(folder))

    def half(state: dict) -> dict:
        return {name: value.to(dtype).contiguous() for name, value in state.items()}

    generator = half(model.state_dict())
    torch.save({"generator": {f"model.{name}": value for name, value in generator.items()}},
               target / "models/longlive_base.pt")
    if (teacher := folder / stage2.latest(folder, stage2.TEACHERS)).exists():
        weights = torch.load(teacher, map_location="cpu", weights_only=True)["generator"]
        torch.save({"difference": difference(weights, generator)}, target / TEACHER)
    write_json(target / "transformer/config.json", transformer_config(stage2.GENERATOR))
    if (folder / "streaming.pt").exists():
        lora = torch.load(folder / "streaming.pt", map_location="cpu", weights_only=True)["lora"]
        names = {f"base_model.model.{name}.lora_{part}.weight": value
                 for name, parts in lora.items() for part, value in parts.items()}
        torch.save({"generator_lora": half(names)}, target / LORA)

    kept = torch.load(folder / "vae.pt", map_location="cpu", weights_only=True)
    vae = AutoencoderKLWan(**vaes.SIZES)
    vae.load_state_dict(kept["state"])
    save_file(half(vae.state_dict()), target / "vae/diffusion_pytorch_model.safetensors")
    write_json(target / "vae/config.json", {"_class_name": "AutoencoderKLWan", **vaes.SIZES,
                                            "latents_mean": kept["mean"], "latents_std": kept["std"]})

    state = half(text.state_dict())
    del state["encoder.embed_tokens.weight"]  # one matrix under two names
    save_file(state, target / "text_encoder/model.safetensors")
    write_json(target / "text_encoder/config.json", stage2.TEXT)
    words.tokenizer.save_pretrained(target / "tokenizer")


def difference(weights: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """How far weights are from those of a base that is near to them: in 8 bits, and the scale of each row."""
    result = {}
    for name, value in weights.items():
        away = value.float() - base[name].float()
        scale = away.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
        result[name] = ((away / scale).round().to(torch.int8), scale)
    return result


def restore(checkpoint: Path, folder: Path, with_lora: bool = True) -> None:
    """The other way: writes `vae.pt` and the generator, as the result of each of its stages, for later ones to start
    from; for the teacher's stages the teacher, and with_lora for the last one the LoRA, where CHECKPOINT has them. What
    is in FOLDER already stays; a generator that does gets no LoRA of another."""
    config = read_json(checkpoint / "vae/config.json")
    if not (folder / "vae.pt").exists():
        state = {name: value.float() for name, value in read_folder(checkpoint / "vae").items()}
        torch.save({"state": state, "mean": config["latents_mean"], "std": config["latents_std"]}, folder / "vae.pt")
    generator = pick_generator(read(checkpoint / "models/longlive_base.pt"), False, checkpoint)
    text, teacher = dict(tied_embedding(read_folder(checkpoint / "text_encoder"))), generator
    if (checkpoint / TEACHER).exists():
        away = torch.load(checkpoint / TEACHER, map_location="cpu", weights_only=True)["difference"]
        teacher = {name: generator[name].float() + steps * scale for name, (steps, scale) in away.items()}
    generators_own = not (folder / stage2.RESULTS[0]).exists()  # no other generator was trained here
    for name in stage2.RESULTS:
        if not (folder / name).exists():
            weights = teacher if name in stage2.TEACHERS else generator
            torch.save({"generator": dict(weights), "text": text}, folder / name)
    if with_lora and generators_own and (checkpoint / LORA).exists() and not (folder / forcing.LORA_BEFORE).exists():
        modules = lora_modules(torch.load(checkpoint / LORA, map_location="cpu", weights_only=True)["generator_lora"])
        torch.save({"lora": modules}, folder / forcing.LORA_BEFORE)
