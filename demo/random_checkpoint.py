"""Seeded random weights in the layout of the released files: `python -m demo.random_checkpoint FOLDER --size toy|full`.

`toy` has the shapes of the small model that comes with this repository, `full` those of Wan 2.1 T2V-1.3B, UMT5-XXL and
LongLive's LoRA: for tests, and for measuring speed and memory, which do not depend on the values.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from demo.captions import corpus
from demo.random_weights import SIZES, Sizes, randomise
from wan.model import CausalWan, WanConfig


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
