"""Parameter names of released files → names of the modules that we load them into. All renaming is here."""

import re
from collections.abc import Callable, Iterable

from torch import Tensor

State = dict[str, Tensor]

# What training wrappers add to names.
_WRAPPERS = re.compile(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.|^module\.")


def generator_names(state: State) -> State:
    """`model.blocks…`, with or without FSDP's wrappers → Wan's native names."""
    plain = {_WRAPPERS.sub("", key): value for key, value in state.items()}
    return {key.removeprefix("model."): value for key, value in plain.items()}


def lora_modules(state: State) -> dict[str, dict[str, Tensor]]:
    """PEFT's `base_model.model.NAME.lora_A.weight` (`.default` allowed) → {NAME: {"A": …, "B": …}}.

    A key of another form is kept under its own name with an empty part, so that it matches no module.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        plain = _WRAPPERS.sub("", key).removeprefix("base_model.model.").removeprefix("model.")
        match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight", plain)
        name, part = match.groups() if match else (plain, "")
        modules.setdefault(name, {})[part] = value
    return modules


def _rename(state: State, rules: Iterable[tuple[str, str | Callable]]) -> State:
    rules = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = pattern.sub(replacement, key)
        renamed[key] = value
    return renamed


def generator_from_diffusers(state: State) -> State:
    """diffusers' WanTransformer3DModel → Wan's native names."""
    return _rename(state, [
        (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
        (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
        (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
        (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
        (r"^condition_embedder\.time_proj\.", "time_projection.1."),
        (r"^scale_shift_table$", "head.modulation"),
        (r"^proj_out\.", "head.head."),
        (r"\.scale_shift_table$", ".modulation"),
        (r"\.attn1\.", ".self_attn."),
        (r"\.attn2\.", ".cross_attn."),
        (r"\.to_([qkv])\.", r".\1."),
        (r"\.to_out\.0\.", ".o."),
        (r"\.norm2\.", ".norm3."),
        (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
        (r"\.ffn\.net\.2\.", ".ffn.2."),
    ])


def text_encoder_from_wan(state: State) -> State:
    """Wan's own UMT5 encoder → transformers' UMT5EncoderModel. `gate.0` is the gated branch, wi_0; `fc1` is wi_1."""
    renamed = _rename(state, [
        (r"^token_embedding\.", "shared."),
        (r"^norm\.", "encoder.final_layer_norm."),
        (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
        (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
        (r"^blocks\.(\d+)\.attn\.([qkvo])\.", r"encoder.block.\1.layer.0.SelfAttention.\2."),
        (r"^blocks\.(\d+)\.pos_embedding\.embedding\.",
         r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
        (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
        (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
        (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
    ])
    return tied_embedding(renamed)


def tied_embedding(state: State) -> State:
    """UMT5's input embedding has two names in transformers; files may hold only one of them."""
    if "shared.weight" in state:
        state.setdefault("encoder.embed_tokens.weight", state["shared.weight"])
    elif "encoder.embed_tokens.weight" in state:
        state["shared.weight"] = state["encoder.embed_tokens.weight"]
    return state


def vae_from_wan(state: State, num_res_blocks: int) -> State:
    """Wan's own VAE → diffusers' AutoencoderKLWan. `num_res_blocks` of the config tells where a decoder stage ends."""
    stage = num_res_blocks + 2  # the decoder's flat list has one block more than that, then an upsampler

    def upsample(match: re.Match) -> str:
        block, layer = divmod(int(match[1]), stage)
        part = "upsamplers.0" if layer == stage - 1 else f"resnets.{layer}"
        return f"decoder.up_blocks.{block}.{part}."

    return _rename(state, [
        (r"^conv1\.", "quant_conv."),
        (r"^conv2\.", "post_quant_conv."),
        (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
        (r"^(encoder|decoder)\.head\.0\.", r"\1.norm_out."),
        (r"^(encoder|decoder)\.head\.2\.", r"\1.conv_out."),
        (r"^(encoder|decoder)\.middle\.0\.", r"\1.mid_block.resnets.0."),
        (r"^(encoder|decoder)\.middle\.1\.", r"\1.mid_block.attentions.0."),
        (r"^(encoder|decoder)\.middle\.2\.", r"\1.mid_block.resnets.1."),
        (r"^encoder\.downsamples\.(\d+)\.", r"encoder.down_blocks.\1."),
        (r"^decoder\.upsamples\.(\d+)\.", upsample),
        (r"\.residual\.0\.", ".norm1."),
        (r"\.residual\.2\.", ".conv1."),
        (r"\.residual\.3\.", ".norm2."),
        (r"\.residual\.6\.", ".conv2."),
        (r"\.shortcut\.", ".conv_shortcut."),
    ])


def decoder_of_vae(state: State) -> State:
    """A VAE's weights in diffusers' names without those that only encode."""
    return {name: value for name, value in state.items() if not name.startswith(("encoder.", "quant_conv."))}
