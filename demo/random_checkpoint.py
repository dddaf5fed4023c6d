"""Seeded random weights in the layout of the released files: `python -m demo.random_checkpoint FOLDER --size toy|full`.

`toy` has the shapes of the small model that comes with this repository, `full` those of Wan 2.1 T2V-1.3B, UMT5-XXL and
LongLive's LoRA: for tests, and for measuring speed and memory, which do not depend on the values.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from demo.captions import corpus
from wan.model import CausalWan, WanConfig


@dataclass(frozen=True)
class Sizes:
    generator: WanConfig
    vae: dict
    text: dict
    lora_rank: int
    text_dtype: torch.dtype


SIZES = {
    "toy": Sizes(
        WanConfig(dim=256, ffn_dim=768, freq_dim=64, text_dim=128, num_heads=4, num_layers=6, text_len=64),
        # Two pixels by two are one position of the VAE's largest maps: a quarter of the work.
        {"base_dim": 16, "dim_mult": [1, 2, 4], "num_res_blocks": 1, "temperal_downsample": [True, True],
         "patch_size": 2, "in_channels": 12, "out_channels": 12},
        {"vocab_size": 1024, "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 3, "num_heads": 4},
        lora_rank=16, text_dtype=torch.float32,
    ),
    "full": Sizes(
        WanConfig(), {}, {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
                          "num_heads": 64},
        lora_rank=256, text_dtype=torch.bfloat16,
    ),
}


def randomise(model: nn.Module, device: str, generator: torch.Generator) -> dict[str, Tensor]:
    """Random values, on the CPU, for a model made on the meta device, drawn one tensor after the other on `device`."""
    return {name: value.cpu() for name, value in draw(model, device, generator)}


def draw(model: nn.Module, device: str, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Name and random value of each tensor of a model made on the meta device: matrices keep the size of what goes
    through them, norms are one, biases small."""
    for name, tensor in model.state_dict().items():
        value = torch.randn(tensor.shape, device=device, generator=generator)
        if "norm" in name and name.endswith(("weight", "gamma")):
            value = torch.ones_like(value)
        elif tensor.dim() > 1 and "modulation" not in name and "relative" not in name:
            value *= tensor[0].numel() ** -0.5
        else:
            value *= 0.1
        yield name, value


def lora(model: nn.Module, rank: int, device: str, generator: torch.Generator) -> dict[str, Tensor]:
    """A small random LoRA for every Linear in the blocks, named as PEFT names it."""
    state = {}
    for name, module in model.named_modules():
        if name.startswith("blocks.") and isinstance(module, nn.Linear):
            for part, shape in (("A", (rank, module.in_features)), ("B", (module.out_features, rank))):
                value = torch.randn(shape, device=device, generator=generator) * 0.1 * shape[1] ** -0.5
                state[f"base_model.model.{name}.lora_{part}.weight"] = value.cpu()
    return state


def tokenizer(vocabulary: int, lines: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE learned from these lines, with UMT5's special tokens; capitals are ignored. Every text has
    tokens."""
    tokens = Tokenizer(models.BPE(unk_token="<unk>"))
    tokens.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokens.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokens.train_from_iterator(lines, trainer)
    tokens.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def transformer_config(sizes: WanConfig) -> dict:
    """A generator's sizes in Diffusers' words."""
    words = asdict(sizes)
    renamed = {"num_attention_heads": words.pop("num_heads"), "attention_head_dim": sizes.head_dim,
               "in_channels": words.pop("in_dim"), "out_channels": words.pop("out_dim")}
    del words["dim"]
    return {"_class_name": "WanTransformer3DModel", **words, **renamed}


def write_json(path: Path, contents: dict) -> None:
    path.write_text(json.dumps(contents, indent=1) + "\n", "utf-8")


def write(folder: Path, sizes: Sizes, seed: int, device: str) -> None:
    """Writes base model (Diffusers layout), `models/longlive_base.pt` and `models/lora.pt` into `folder`."""
    random = torch.Generator(device).manual_seed(seed)
    for name in ("transformer", "text_encoder", "tokenizer", "vae", "models"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        generator = CausalWan(sizes.generator)
        vae = AutoencoderKLWan.from_config(sizes.vae)
        text_config = UMT5Config(feed_forward_proj="gated-gelu", **sizes.text)
        text = UMT5EncoderModel(text_config)

    weights = randomise(generator, device, random)
    torch.save({"generator": {f"model.{name}": value for name, value in weights.items()}},
               folder / "models/longlive_base.pt")
    torch.save({"generator_lora": lora(generator, sizes.lora_rank, device, random)}, folder / "models/lora.pt")
    write_json(folder / "transformer/config.json", transformer_config(sizes.generator))

    weights = randomise(vae, device, random)
    weights["decoder.conv_out.weight"] *= 2  # so that the picture has contrast
    save_file(weights, folder / "vae/diffusion_pytorch_model.safetensors")
    write_json(folder / "vae/config.json", {"_class_name": "AutoencoderKLWan", **sizes.vae})

    weights = randomise(text, device, random)
    del weights["encoder.embed_tokens.weight"]  # one matrix under two names
    save_file({name: value.to(sizes.text_dtype) for name, value in weights.items()},
              folder / "text_encoder/model.safetensors")
    write_json(folder / "text_encoder/config.json", {"feed_forward_proj": "gated-gelu", **sizes.text})
    tokenizer(512, corpus(100)).save_pretrained(folder / "tokenizer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="toy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    write(args.folder, SIZES[args.size], args.seed, args.device)


if __name__ == "__main__":
    main()
