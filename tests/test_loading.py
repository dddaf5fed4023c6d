"""The same weights in every layout that users have give the same model; what does not fit is said."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from pipeline.loading import BaseModel, fingerprints, load_decoder, load_generator, load_text_encoder
from tests.conftest import GOLDEN, TINY
from utils.config import Config
from utils.errors import UserError
from wan.kv_cache import KVCache
from wan.model import CausalWan
from wan.rope import RotaryEmbedding

State = dict[str, torch.Tensor]
SIZES = dataclasses.replace(TINY.generator, dim=44)  # heads of 22: the three axes of RoPE have 5, 3 and 3 pairs

# Wan's own names → diffusers' names of the transformer, replaced in this order.
TRANSFORMER = [
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"), ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"), ("modulation", "scale_shift_table"), ("self_attn", "attn1"), ("cross_attn", "attn2"),
    (".q.", ".to_q."), (".k.", ".to_k."), (".v.", ".to_v."), (".o.", ".to_out.0."), ("norm3", "norm2"),
    ("ffn.0", "ffn.net.0.proj"), ("ffn.2", "ffn.net.2"),
]
# transformers' names → Wan's own of the text encoder.
TEXT = [
    ("encoder.block.", "blocks."), ("layer.0.SelfAttention.relative_attention_bias", "pos_embedding.embedding"),
    ("layer.0.SelfAttention", "attn"), ("layer.0.layer_norm", "norm1"), ("layer.1.layer_norm", "norm2"),
    ("layer.1.DenseReluDense.wi_0", "ffn.gate.0"), ("layer.1.DenseReluDense.wi_1", "ffn.fc1"),
    ("layer.1.DenseReluDense.wo", "ffn.fc2"), ("encoder.final_layer_norm", "norm"), ("shared", "token_embedding"),
]
# diffusers' names → Wan's own of the VAE, after the numbered blocks.
VAE = [
    ("post_quant_conv", "conv2"), ("quant_conv", "conv1"), ("resnets.0", "0"), ("attentions.0", "1"),
    ("resnets.1", "2"), ("mid_block", "middle"), ("norm_out", "head.0"), ("conv_out", "head.2"), ("conv_in", "conv1"),
    ("conv_shortcut", "shortcut"),
]
RESIDUAL = [("norm1", "residual.0"), ("conv1", "residual.2"), ("norm2", "residual.3"), ("conv2", "residual.6")]


def replaced(name: str, table: list[tuple[str, str]]) -> str:
    for old, new in table:
        name = name.replace(old, new)
    return name


def native_vae_name(name: str) -> str:
    residual = "resnets." in name or "down_blocks." in name
    for stage in range(4):  # each of three residual blocks and an upsampler, in one list
        name = name.replace(f"decoder.up_blocks.{stage}.upsamplers.0", f"decoder.upsamples.{4 * stage + 3}")
        for layer in range(3):
            name = name.replace(f"decoder.up_blocks.{stage}.resnets.{layer}", f"decoder.upsamples.{4 * stage + layer}")
    name = name.replace("down_blocks", "downsamples")
    return replaced(replaced(name, RESIDUAL) if residual else name, VAE)


def as_published(state: State) -> State:
    """LongLive's names of a generator."""
    return {f"model.{name}": value for name, value in state.items()}


@pytest.fixture(scope="module")
def generator_state() -> State:
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = CausalWan(SIZES).state_dict()
    return {name: torch.randn(value.shape) * (1 if value.dim() == 1 else 0.2) for name, value in shapes.items()}


@pytest.fixture(scope="module")
def models(tiny_folder, generator_state, tmp_path_factory) -> Path:
    """A folder with the same model three times: `diffusers`, `sharded` (its transformer in several files), `native`."""
    folder = tmp_path_factory.mktemp("layouts")
    transformer = WanTransformer3DModel(
        num_attention_heads=SIZES.num_heads, attention_head_dim=SIZES.head_dim, in_channels=16, out_channels=16,
        text_dim=SIZES.text_dim, freq_dim=SIZES.freq_dim, ffn_dim=SIZES.ffn_dim, num_layers=SIZES.num_layers)
    transformer.load_state_dict({replaced(name, TRANSFORMER): value for name, value in generator_state.items()})
    for name, shard in (("diffusers", "1GB"), ("sharded", "40KB")):
        shutil.copytree(tiny_folder / "tiny", folder / name, ignore=shutil.ignore_patterns("transformer", "models"))
        transformer.save_pretrained(folder / name / "transformer", max_shard_size=shard)

    native = folder / "native"
    shutil.copytree(folder / "diffusers/tokenizer", native / "google/umt5-xxl")
    save_file(generator_state, native / "diffusion_pytorch_model.safetensors")
    config = {key: getattr(SIZES, key) for key in ("dim", "ffn_dim", "freq_dim", "in_dim", "out_dim", "num_heads",
                                                   "num_layers", "eps", "text_len")}
    (native / "config.json").write_text(json.dumps(
        {"_class_name": "WanModel", "model_type": "t2v", **config, "text_dim": SIZES.text_dim}))
    text = load_file(folder / "diffusers/text_encoder/model.safetensors")
    torch.save({replaced(name, TEXT): value for name, value in text.items()},
               native / "models_t5_umt5-xxl-enc-bf16.pth")
    shutil.copy(folder / "diffusers/text_encoder/config.json", native / "t5_config.json")
    vae = load_file(folder / "diffusers/vae/diffusion_pytorch_model.safetensors")
    torch.save({native_vae_name(name): value for name, value in vae.items()}, native / "Wan2.1_VAE.pth")
    (native / "vae_config.json").write_text(json.dumps(TINY.vae))
    return folder


@pytest.fixture
def config(models) -> Config:
    return Config(wan_folder=str(models), model_name="diffusers", text_encoder_dtype="float32", device="cpu")


def named(config: Config, name: str, **changes) -> tuple[Config, BaseModel]:
    config = dataclasses.replace(config, model_name=name, **changes)
    return config, BaseModel(config)


def generator_of(config: Config, dtype: torch.dtype = torch.float32) -> CausalWan:
    return load_generator(config, BaseModel(config), dtype)


@torch.inference_mode()
def flow(model: CausalWan, latents: torch.Tensor, t: float, embeds: torch.Tensor) -> torch.Tensor:
    """The flow of a whole clip: all its latents are one block, and attend to each other."""
    batch, frames, _, height, width = latents.shape
    rows, columns = height // 2, width // 2
    rope = RotaryEmbedding(model.config.head_dim, rows, columns, "cpu")
    cache = KVCache(layers=model.config.num_layers, batch=batch, tokens=rows * columns, heads=model.config.num_heads,
                    head_dim=model.config.head_dim, window=None, sink=0, dtype=model.patch_embedding.weight.dtype,
                    device="cpu")
    cache.begin(0, frames)
    return model(latents, t, 0, rope, cache, model.encode_text(embeds))


def clip() -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [2, 5, 16, 4, 6] and embeddings [2, 7, text_dim]."""
    random = torch.Generator().manual_seed(1)
    return (torch.randn(2, 5, 16, 4, 6, generator=random),
            torch.randn(2, 7, SIZES.text_dim, generator=random))


def test_native_names_of_this_test_are_those_of_the_recorded_files(models):
    for name in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"):
        ours, recorded = (torch.load(folder / name) for folder in (models / "native", GOLDEN))
        layer = re.compile(r"^blocks\.[1-9]\d*\.")  # the recorded text encoder has one more
        assert set(ours) == {key for key in recorded if not layer.match(key)}


@pytest.mark.parametrize("name", ["sharded", "native"])
def test_every_layout_gives_the_same_model(config, name):
    base, other = named(config, "diffusers"), named(config, name)
    latents, embeds = clip()

    def assert_same(a: torch.Tensor, b: torch.Tensor, least: float) -> None:
        """But for the last digits: how a product is summed may depend on where in memory its weights are mapped."""
        assert a.std() > least
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)

    assert_same(*(flow(load_generator(*layout, torch.float32), latents, 500.0, embeds) for layout in (base, other)),
                0.1)
    with torch.inference_mode():
        assert_same(*(load_decoder(*layout, torch.float32).stream()(latents) for layout in (base, other)), 0.01)
    assert_same(*(load_text_encoder(*layout, 512)("a red ball bounces") for layout in (base, other)), 0.1)


@pytest.mark.parametrize("t", [1000.0, 833.3333, 0.0])
def test_a_whole_clip_gives_the_flow_of_diffusers_own_transformer(config, t):
    latents, embeds = clip()
    reference = WanTransformer3DModel.from_pretrained(Path(config.wan_folder) / "diffusers/transformer").eval()
    with torch.inference_mode():
        expected = reference(latents.transpose(1, 2), torch.tensor([t, t], dtype=torch.float64),
                             F.pad(embeds, (0, 0, 0, 512 - embeds.shape[1]))).sample.transpose(1, 2)
    got = flow(generator_of(config), latents, t, embeds)
    assert got.shape == expected.shape and expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_every_parameter_of_diffusers_transformer_has_its_place(config, generator_state):
    file = load_file(Path(config.wan_folder) / "diffusers/transformer/diffusion_pytorch_model.safetensors")
    assert len(file) == len(generator_state)
    loaded = generator_of(config).state_dict()
    assert set(loaded) == set(generator_state)
    assert all(torch.equal(loaded[name], value) for name, value in generator_state.items())


def test_missing_shard_is_named(config, models, tmp_path):
    shutil.copytree(models / "sharded", tmp_path / "sharded")
    shards = sorted((tmp_path / "sharded/transformer").glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    config = dataclasses.replace(config, wan_folder=str(tmp_path), model_name="sharded")
    for load in (generator_of, fingerprints):
        with pytest.raises(UserError, match=rf"{re.escape(str(shards[1]))}: no such file, but .*index\.json names it"):
            load(config)


def test_folder_without_weights_is_named(config, models, tmp_path):
    shutil.copytree(models / "diffusers", tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    config = dataclasses.replace(config, wan_folder=str(tmp_path), model_name="empty")
    with pytest.raises(UserError, match=r"empty/transformer: no \.safetensors file in it; get it with: bash scripts/"):
        generator_of(config)
    with pytest.raises(UserError, match=r"model_name=nowhere: no such folder in .*; get it with: bash scripts/"):
        BaseModel(dataclasses.replace(config, model_name="nowhere"))


@pytest.mark.parametrize("missing", ["diffusion_pytorch_model.safetensors", "Wan2.1_VAE.pth", "config.json",
                                     "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl"])
def test_missing_part_of_a_native_folder_is_named(config, models, tmp_path, missing):
    shutil.copytree(models / "native", tmp_path / "native")
    path = tmp_path / "native" / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    config = dataclasses.replace(config, wan_folder=str(tmp_path), model_name="native")
    with pytest.raises(UserError, match=rf"{re.escape(missing)}: no such (file|folder).*; get it with"):
        base = BaseModel(config)
        load_generator(config, base, torch.float32)
        load_decoder(config, base, torch.float32)
        load_text_encoder(config, base, 512)


def test_base_transformer_is_not_needed_where_longlive_has_its_own(config, models, tmp_path, generator_state):
    shutil.copytree(models / "native", tmp_path / "native", ignore=shutil.ignore_patterns("diffusion_*"))
    torch.save({"generator": as_published(generator_state)}, tmp_path / "base.pt")
    config = dataclasses.replace(config, wan_folder=str(tmp_path), model_name="native",
                                 generator_ckpt=str(tmp_path / "base.pt"))
    assert len(generator_of(config).state_dict()) == len(generator_state)
    assert set(fingerprints(config)) == {str(tmp_path / "base.pt"), "native/Wan2.1_VAE.pth",
                                         "native/models_t5_umt5-xxl-enc-bf16.pth"}


@pytest.mark.parametrize("name", ["diffusers", "sharded", "native"])
def test_every_weight_file_has_a_fingerprint(config, models, name):
    """Also where files of two folders have one name."""
    files = {path for pattern in ("*.safetensors", "*.pth") for path in (models / name).rglob(pattern)}
    marks = fingerprints(dataclasses.replace(config, model_name=name))
    assert set(marks) == {f"{name}/{path.relative_to(models / name)}" for path in files}
    assert len(set(marks.values())) == len(files)


def wrapped(state: State, wrapper: str) -> State:
    """Names as training leaves them, with `wrapper` at the front and inside."""
    return {f"model.{wrapper}{name.replace('self_attn.', f'{wrapper}self_attn.')}": value
            for name, value in state.items()}


LAYOUTS = {
    "generator": lambda state: {"generator": as_published(state)},
    "model": lambda state: {"model": state, "step": 7},
    "flat": lambda state: as_published(state),
    "flat native": lambda state: state,
    "wrapped": lambda state: {"generator": wrapped(state, "_fsdp_wrapped_module.")},
    "compiled": lambda state: {"generator": {f"module.{name}": v for name, v in wrapped(state, "_orig_mod.").items()}},
    "beside others": lambda state: {"critic": {"a": torch.zeros(1)}, "generator": as_published(state),
                                    "generator_ema": {"b": torch.zeros(1)}, "model": {"c": torch.zeros(1)}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_generator_is_found_in_every_layout(config, generator_state, tmp_path, layout):
    torch.save(LAYOUTS[layout](generator_state), tmp_path / "base.pt")
    loaded = generator_of(dataclasses.replace(config, generator_ckpt=str(tmp_path / "base.pt"))).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in generator_state.items())


def test_generator_may_be_safetensors(config, generator_state, tmp_path):
    save_file(as_published(generator_state), tmp_path / "base.safetensors")
    loaded = generator_of(dataclasses.replace(config, generator_ckpt=str(tmp_path / "base.safetensors"))).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in generator_state.items())


def test_ema_is_taken_where_it_is_asked_for(config, generator_state, tmp_path):
    ema = wrapped({name: value + 1 for name, value in generator_state.items()}, "_fsdp_wrapped_module.")
    torch.save({"generator": as_published(generator_state), "generator_ema": ema}, tmp_path / "base.pt")
    config = dataclasses.replace(config, generator_ckpt=str(tmp_path / "base.pt"))
    plain = generator_of(config).state_dict()
    averaged = generator_of(dataclasses.replace(config, use_ema=True)).state_dict()
    for name, value in generator_state.items():
        assert torch.equal(plain[name], value) and torch.equal(averaged[name], value + 1)


@pytest.mark.parametrize("layout", ["generator", "flat"])
def test_ema_that_is_not_there_is_an_error(config, generator_state, tmp_path, layout):
    torch.save(LAYOUTS[layout](generator_state), tmp_path / "base.pt")
    with pytest.raises(UserError, match=r"base\.pt: no generator_ema in it, it has .*; set use_ema: false"):
        generator_of(dataclasses.replace(config, generator_ckpt=str(tmp_path / "base.pt"), use_ema=True))


def test_checkpoint_without_a_generator_says_what_it_has(config, tmp_path):
    torch.save({"optimizer": {"a": torch.zeros(1)}, "step": 3}, tmp_path / "base.pt")
    with pytest.raises(UserError, match=r"base\.pt: no generator or model in it, it has optimizer, step$"):
        generator_of(dataclasses.replace(config, generator_ckpt=str(tmp_path / "base.pt")))


def test_checkpoint_of_another_size_names_file_parameter_and_shapes(config, generator_state, tmp_path):
    wide = {name: torch.cat([value, value]) if name == "blocks.1.ffn.0.bias" else value
            for name, value in generator_state.items()}
    torch.save({"generator": as_published(wide)}, tmp_path / "base.pt")
    with pytest.raises(UserError, match=r"base\.pt: blocks\.1\.ffn\.0\.bias has shape \[128\], the model needs \[64\]"):
        generator_of(dataclasses.replace(config, generator_ckpt=str(tmp_path / "base.pt")))


@pytest.mark.parametrize("name", ["diffusers", "sharded", "native"])
def test_bfloat16_start_after_start(config, models, tmp_path, name, generator_state):
    """The first start leaves a bfloat16 copy of the generator, the others read it, and nothing else is left."""
    shutil.copytree(models / name, tmp_path / name)
    config = dataclasses.replace(config, wan_folder=str(tmp_path), model_name=name, text_encoder_dtype="bfloat16")
    before, marks = {path for path in tmp_path.rglob("*") if path.is_file()}, fingerprints(config)
    for _ in range(3):
        base = BaseModel(config)
        loaded = load_generator(config, base, torch.bfloat16).state_dict()
        assert all(torch.equal(loaded[name], value.bfloat16()) for name, value in generator_state.items())
    left = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert len(left) == 1 and ".merged-" in left.pop().name
    assert fingerprints(config) == marks
    assert generator_of(config).patch_embedding.weight.dtype == torch.float32
    assert load_decoder(config, base, torch.bfloat16).parameter.dtype == torch.bfloat16
    encoder = load_text_encoder(config, base, 512)
    assert {value.dtype for value in encoder.model.parameters()} == {torch.bfloat16}
    assert encoder("a ball").dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["diffusers", "native"])
def test_the_text_encoders_embedding_is_one_matrix(config, name):
    """So that a move to another device makes one copy of it."""
    model = load_text_encoder(*named(config, name), 512).model
    assert model.encoder.embed_tokens.weight.data_ptr() == model.shared.weight.data_ptr()
    model.to(torch.float64)
    assert model.encoder.embed_tokens.weight.data_ptr() == model.shared.weight.data_ptr()
    names = [parameter for parameter, value in model.named_parameters() if value.shape[0] == TINY.text["vocab_size"]]
    assert len(names) == 1
