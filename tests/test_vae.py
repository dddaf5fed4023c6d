"""The VAE and the tiny decoder: a video decoded block by block is the video decoded at once."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from demo.random_weights import SIZES
from pipeline.loading import BaseModel, load_decoder
from tests.diffusers_vae import DiffusersVAE, empty
from utils.checkpoint import fill, read_folder, read_json
from utils.errors import UserError
from wan.sizes import from_sizes
from wan.tiny_decoder import TinyDecoder
from wan.vae import WanVAE
from wan.vae_decoder import VAEConfig, VAEDecoder

LATENTS = 6


def tiny_weights() -> dict[str, torch.Tensor]:
    """Random weights in the layout of a published file: a decoder of four different widths, and an encoder."""
    torch.manual_seed(0)
    state = {name: torch.randn_like(value) * value[0].numel() ** -0.5 if value.dim() > 1 else value
             for name, value in TinyDecoder(16, [12, 8, 6, 4]).state_dict().items()}
    return state | {"encoder.0.weight": torch.zeros(4, 3, 3, 3), "encoder.0.bias": torch.zeros(4)}


@pytest.fixture(scope="module")
def load(tiny_folder, tmp_path_factory):
    """load("wan") or load("taehv") → the decoder that a config with this `vae` gives; load("diffusers") → the plain
    version of the first."""
    from utils.config import Config

    config = Config(wan_folder=str(tiny_folder), model_name="tiny")
    published = tmp_path_factory.mktemp("taehv") / "taew2_1.pth"
    torch.save(tiny_weights(), published)
    configs = {"wan": config, "taehv": dataclasses.replace(config, vae="taehv", vae_ckpt=str(published))}
    loaded = {vae: load_decoder(c, BaseModel(c), torch.float32) for vae, c in configs.items()}
    folder = tiny_folder / "tiny/vae"
    loaded["diffusers"] = DiffusersVAE(fill(empty(read_json(folder / "config.json")), read_folder(folder), str(folder)))
    return loaded.__getitem__


@pytest.fixture(scope="module", params=["wan", "taehv"])
def decoder(request, load):
    return load(request.param)


@pytest.fixture(scope="module")
def plain(decoder, load):
    """What decodes a whole video at once as `decoder` does it block by block."""
    return load("diffusers") if isinstance(decoder, WanVAE) else decoder


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    return torch.randn(1, LATENTS, 16, 3, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
@torch.inference_mode()
def whole(plain, latents) -> torch.Tensor:
    """All latents decoded at once."""
    return plain.decode(latents)


@torch.inference_mode()
def blocks_of(decoder, latents: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    stream = decoder.stream()
    return [stream(block) for block in latents[:, : sum(sizes)].split(sizes, dim=1)]


def splits(left: int = LATENTS):
    """Sizes of one block or more, `left` latents at most together."""
    return st.lists(st.integers(1, 4), min_size=1, max_size=left).filter(lambda sizes: sum(sizes) <= left)


def test_whole_video_has_four_frames_a_latent_but_one_for_the_first(whole):
    assert whole.shape == (1, 4 * LATENTS - 3, 3, 24, 32)
    assert whole.min() >= -1 and whole.max() <= 1 and whole.std() > 0.01


@settings(max_examples=15, deadline=None)
@given(sizes=splits())
def test_any_split_into_blocks_gives_the_frames_of_the_whole(decoder, latents, whole, sizes):
    blocks = blocks_of(decoder, latents, sizes)
    assert [block.shape[1] for block in blocks] == [4 * sizes[0] - 3, *(4 * size for size in sizes[1:])]
    frames = torch.cat(blocks, 1)
    torch.testing.assert_close(frames, whole[:, : frames.shape[1]], rtol=0, atol=1e-4)


@torch.inference_mode()
def test_a_ring_of_frames_holds_what_copies_hold(load, latents, monkeypatch):
    """That convolutions read their frames from a ring, on GPUs where they can, changes nothing."""
    vae = load("wan")
    vae.model.double()
    try:
        videos = torch.cat([latents, latents.flip(1)]).double()
        copied = torch.cat(blocks_of(vae, videos, [2, 3, 1]), 1)
        monkeypatch.setattr("wan.causal_conv.reads_rings", lambda x, weight: True)
        torch.testing.assert_close(torch.cat(blocks_of(vae, videos, [2, 3, 1]), 1), copied, rtol=0, atol=1e-10)
    finally:
        vae.model.float()


@torch.inference_mode()
def test_two_videos_at_a_time_do_not_disturb_each_other(decoder, plain, latents):
    other = latents.flip(1)
    alone = [torch.cat(blocks_of(decoder, video, [3, 2]), 1) for video in (latents, other)]
    first, second = decoder.stream(), decoder.stream()
    taken = [first(latents[:, :3])]
    between = [second(other[:, :3])]
    plain.decode(other)  # and neither does one that is decoded at once
    taken.append(first(latents[:, 3:5]))
    between.append(second(other[:, 3:5]))
    torch.testing.assert_close(torch.cat(taken, 1), alone[0], rtol=0, atol=0)
    torch.testing.assert_close(torch.cat(between, 1), alone[1], rtol=0, atol=0)


@torch.inference_mode()
def test_videos_of_a_batch_are_independent(plain, latents, whole):
    both = plain.decode(torch.cat([latents.flip(1), latents]))
    torch.testing.assert_close(both[1:], whole, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_decodes_latents_of_another_type_in_its_own(decoder, latents, whole):
    decoded = torch.cat(blocks_of(decoder, latents.double(), [3, 3]), 1)
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, whole, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_encoding_gives_latents_of_the_shape_that_was_decoded(load, latents):
    vae = load("diffusers")
    encoded = vae.encode(vae.decode(latents))
    assert encoded.shape == latents.shape and encoded.isfinite().all()


@torch.inference_mode()
def test_latents_are_normalised_by_channel(load):
    """Encoding takes each channel's mean and std out of what the model gives, decoding puts them back."""
    vae = load("diffusers")
    pixels = torch.zeros(1, 5, 3, 16, 16)
    raw = vae.model.encode(pixels.transpose(1, 2)).latent_dist.mean.transpose(1, 2)
    config = vae.model.config
    mean, std = (torch.tensor(values).view(16, 1, 1) for values in (config.latents_mean, config.latents_std))
    torch.testing.assert_close(vae.encode(pixels) * std + mean, raw, rtol=0, atol=1e-4)
    torch.testing.assert_close(vae.decode(vae.encode(pixels)),
                               vae.model.decode(raw.transpose(1, 2)).sample.transpose(1, 2), rtol=0, atol=1e-4)


ANOTHER = {"base_dim": 4, "decoder_base_dim": 8, "dim_mult": [1, 2], "temperal_downsample": [True], "num_res_blocks": 3,
           "z_dim": 6, "latents_mean": [0.5] * 6, "latents_std": [2.0] * 6}


@pytest.mark.parametrize("sizes", [{}, {"base_dim": 4}, SIZES["toy"].vae, ANOTHER],
                         ids=["published", "tiny", "small", "another"])
def test_weights_are_those_of_diffusers_decoder(sizes):
    theirs = empty(sizes)
    with torch.device("meta"):
        ours = VAEDecoder(from_sizes(VAEConfig, dict(theirs.config)))
    shapes = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: shape for name, shape in shapes.items() if not name.startswith(("encoder.", "quant_conv."))}
    assert [block.upsamplers and block.upsamplers[0].mode for block in ours.decoder.up_blocks] \
        == [block.upsamplers and block.upsamplers[0].mode for block in theirs.decoder.up_blocks]
    defaults = from_sizes(VAEConfig, sizes)
    assert [list(defaults.latents_mean), list(defaults.latents_std), defaults.patch_size] \
        == [list(theirs.config.latents_mean), list(theirs.config.latents_std), theirs.config.patch_size]


def test_every_weight_of_the_decoder_has_its_part():
    model = VAEDecoder(VAEConfig(base_dim=4))
    stream = WanVAE(model).stream()
    model.requires_grad_(True)
    latents = torch.randn(1, 3, 16, 2, 2, generator=torch.Generator().manual_seed(0))
    stream(latents).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_the_tiny_decoders_names_are_those_of_the_published_file():
    memory = [3, 4, 5, 9, 10, 11, 15, 16, 17]
    published = {f"decoder.{i}.{part}" for i in (1, 22) for part in ("weight", "bias")}
    published |= {f"decoder.{i}.conv.{j}.{part}" for i in memory for j in (0, 2, 4) for part in ("weight", "bias")}
    published |= {f"decoder.{i}.conv.weight" for i in (7, 13, 19)} | {f"decoder.{i}.weight" for i in (8, 14, 20)}
    with torch.device("meta"):
        state = TinyDecoder(16, [256, 128, 64, 64]).state_dict()
    assert set(state) == published
    shapes = {name: list(value.shape) for name, value in state.items()}
    assert shapes["decoder.1.weight"] == [256, 16, 3, 3] and shapes["decoder.22.weight"] == [3, 64, 3, 3]
    assert shapes["decoder.8.weight"] == [128, 256, 3, 3] and shapes["decoder.20.weight"] == [64, 64, 3, 3]
    assert shapes["decoder.3.conv.0.weight"] == [256, 512, 3, 3]  # the frame and the one before it
    assert shapes["decoder.7.conv.weight"] == [256, 256, 1, 1]
    assert shapes["decoder.13.conv.weight"] == [256, 128, 1, 1]  # one frame becomes two


def test_the_config_chooses_and_the_tiny_decoders_file_may_hold_an_encoder(load):
    assert isinstance(load("wan"), WanVAE) and isinstance(load("taehv"), TinyDecoder)
    assert any(name.startswith("encoder.") for name in tiny_weights())
    assert all(name.startswith("decoder.") for name in load("taehv").state_dict())


def test_another_file_is_not_taken_for_a_tiny_decoder(tiny_config):
    config = dataclasses.replace(tiny_config, vae="taehv", vae_ckpt=tiny_config.generator_ckpt)
    with pytest.raises(UserError, match=r"longlive_base\.pt: not a tiny decoder for Wan 2\.1, it has no .*decoder\.1"):
        load_decoder(config, BaseModel(config), torch.float32)
