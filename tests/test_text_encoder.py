"""A prompt's way to its embeddings: mended text, tokens, what is cut off, and UMT5 in both layouts."""

import copy
import dataclasses
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel

from pipeline.engine import Engine
from pipeline.loading import BaseModel, load_text_encoder
from tests.conftest import GOLDEN
from utils.checkpoint import fill, read_folder, read_json
from utils.config import Config
from utils.errors import UserError
from utils.key_names import tied_embedding
from wan.sizes import from_sizes
from wan.text_encoder import TextEncoder, clean_prompt
from wan.umt5 import UMT5Config, UMT5Encoder

PROMPTS = ["a red ball", "a small blue cube stands on a hill at night, and the wind moves the grass", "x"]
LENGTH = 512


@pytest.fixture(scope="module")
def config(tiny_folder) -> Config:
    return Config(wan_folder=str(tiny_folder), model_name="tiny", text_encoder_dtype="float32")


@pytest.fixture(scope="module")
def encoder(config) -> TextEncoder:
    return load_text_encoder(config, BaseModel(config), LENGTH)


@pytest.fixture(scope="module")
def transformers_own(tiny_folder) -> tuple[UMT5EncoderModel, PreTrainedTokenizerBase]:
    """The plain version: the same encoder and tokenizer, loaded by transformers."""
    folder = tiny_folder / "tiny/text_encoder"
    with torch.device("meta"):
        model = UMT5EncoderModel(transformers.UMT5Config(**read_json(folder / "config.json")))
    return (fill(model, tied_embedding(read_folder(folder)), str(folder)),
            AutoTokenizer.from_pretrained(tiny_folder / "tiny/tokenizer"))


@pytest.fixture(scope="module")
def native(tiny_folder, tmp_path_factory) -> Config:
    """A folder in Wan's own layout with the recorded text encoder."""
    folder = tmp_path_factory.mktemp("wan") / "native"
    shutil.copytree(tiny_folder / "tiny/tokenizer", folder / "google/umt5-xxl")
    for name in ("models_t5_umt5-xxl-enc-bf16.pth", "t5_config.json"):
        shutil.copy(GOLDEN / name, folder / name)
    return Config(wan_folder=str(folder.parent), model_name="native", text_encoder_dtype="float32")


@pytest.mark.parametrize(("written", "read"), [
    ("a red ball", "a red ball"),
    ("  a red \t ball\n\n on   grass \r\n", "a red ball on grass"),
    ("a red\u00a0ball\u3000here", "a red ball here"),
    ("cafÃ© with crÃ¨me", "café with crème"),  # UTF-8 read as Latin-1
    ("it is Marieâ€™s dog", "it is Marie's dog"),  # UTF-8 read as Windows-1252; then plain quotes
    ("“two” ‘quotes’", '"two" \'quotes\''),
    ("salt &amp; pepper", "salt & pepper"),
    ("salt &amp;amp; pepper &amp;lt;3", "salt & pepper <3"),  # escaped twice
    ("a <b> salt &amp;amp; pepper", "a <b> salt & pepper"),  # ftfy leaves text with tags alone
    ("a &lt;b&gt; &quot;c&quot; &#39;d&#39;", "a <b> \"c\" 'd'"),
    ("ﬁne ﬂowers", "fine flowers"),
    ("red&nbsp;&nbsp;ball", "red ball"),
    ("一只红色的球 🎈 über", "一只红色的球 🎈 über"),
    ("", ""),
])
def test_text_is_mended_as_for_training(written, read):
    assert clean_prompt(written) == read


def test_text_that_is_mended_to_the_same_has_the_same_embeddings(encoder):
    plain, damaged = encoder("salt & pepper on a café table"), encoder(" salt &amp;amp; pepper\ton a cafÃ© table\n")
    assert torch.equal(plain, damaged)
    assert not torch.equal(plain, encoder("salt & pepper on a cafe table"))


@pytest.mark.parametrize("prompt", PROMPTS)
@torch.inference_mode()
def test_embeddings_are_those_of_the_padded_and_masked_prompt(encoder, transformers_own, prompt):
    """As Wan computes them: 512 tokens, those past the prompt's end masked, and zero in what the generator sees."""
    model, tokenizer = transformers_own
    padded = tokenizer(prompt, padding="max_length", truncation=True, max_length=LENGTH, add_special_tokens=True,
                       return_tensors="pt")
    count = int(padded.attention_mask.sum())
    expected = model(**padded).last_hidden_state
    got = encoder(prompt)
    assert got.shape == (1, count, 32) and got.abs().min(-1).values.max() > 0
    torch.testing.assert_close(got, expected[:, :count], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 7, 130, 300])  # beyond 128 tokens all distances are one
@torch.inference_mode()
def test_embeddings_are_those_of_transformers_to_the_last_bit(transformers_own, dtype, length):
    theirs = copy.deepcopy(transformers_own[0]).to(dtype)
    ours = UMT5Encoder(from_sizes(UMT5Config, theirs.config.to_dict())).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(0, 512, (1, length), generator=torch.Generator().manual_seed(length))
    assert torch.equal(ours(ids), theirs(input_ids=ids).last_hidden_state)


@pytest.mark.parametrize("prompt", [*PROMPTS, "", "<pad> 一只 🎈 </s> <nothing>"])
def test_tokens_are_those_of_transformers(encoder, transformers_own, prompt):
    tokenizer = transformers_own[1]
    ids = tokenizer(prompt).input_ids
    assert encoder.tokens(prompt) == ids
    short = TextEncoder(encoder.model, encoder.tokenizer, 5)
    cut = tokenizer(prompt, truncation=True, max_length=5, return_tensors="pt").input_ids
    assert torch.equal(short(prompt), encoder.model(cut))
    assert short.overflow(prompt)[1] == (tokenizer.decode(ids[4:], skip_special_tokens=True) if len(ids) > 5 else "")


def test_defaults_are_the_sizes_of_the_published_encoder():
    config = from_sizes(UMT5Config, {})
    with torch.device("meta"):
        model = UMT5Encoder(config)
    assert 5.6e9 < sum(value.numel() for value in model.parameters()) < 5.7e9


def test_tokens_end_with_the_end_token(encoder):
    tokens = encoder.tokens("a red ball")
    assert tokens[-1] == encoder.tokenizer.token_to_id("</s>") and tokens.count(tokens[-1]) == 1
    assert encoder("a red ball").shape[1] == len(tokens)
    assert encoder.tokens("") == [tokens[-1]] and encoder("").shape[1] == 1


def test_a_prompt_too_long_says_what_is_cut_off(encoder):
    prompt = PROMPTS[1]
    count = len(encoder.tokens(prompt))
    fits = TextEncoder(encoder.model, encoder.tokenizer, count)
    assert fits.overflow(prompt) == (count, "")
    short = TextEncoder(encoder.model, encoder.tokenizer, 9)
    total, cut = short.overflow(prompt)
    assert total == count and cut and prompt.endswith(cut.strip())
    kept = prompt.removesuffix(cut.strip())
    assert torch.equal(short(prompt), fits(kept)) and short(prompt).shape[1] == 9
    assert len(encoder.tokens(kept)) == 9


def test_a_prompt_too_long_is_warned_of_once(tiny_config, encoder, caplog):
    short = TextEncoder(encoder.model, encoder.tokenizer, 9)
    engine = Engine.from_config(tiny_config)
    engine = Engine(tiny_config, engine.generator, engine.decoder, lambda: short, engine.device)
    for _ in range(2):
        assert engine.encode(PROMPTS[1]).shape == (1, 9, 32)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"has {len(encoder.tokens(PROMPTS[1]))} tokens, the first 9 are used; cut off:" in warning
    assert "moves the grass" in warning


def test_size_of_a_small_text_encoder_is_not_zero(tiny_config, caplog):
    caplog.set_level("INFO")
    Engine.from_config(tiny_config).encode("a ball")
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Text encoder: ")]
    assert line.endswith(" MB on cpu") and float(line.split()[2]) > 0


@pytest.mark.parametrize("layout", ["diffusers", "native"])
def test_the_input_embedding_is_the_files_own(layout, config, native):
    """Under both of its names, not left at random under the one that the file lacks."""
    base = BaseModel(native if layout == "native" else config)
    model = load_text_encoder(native if layout == "native" else config, base, LENGTH).model
    written = torch.load(base.folder / "models_t5_umt5-xxl-enc-bf16.pth")["token_embedding.weight"] \
        if layout == "native" else load_file(base.folder / "text_encoder/model.safetensors")["shared.weight"]
    assert torch.equal(model.shared.weight, written) and torch.equal(model.encoder.embed_tokens.weight, written)


@pytest.mark.parametrize("kept", ["shared.weight", "encoder.embed_tokens.weight", "both"])
def test_either_name_of_the_embedding_will_do(config, tiny_folder, tmp_path, encoder, kept):
    shutil.copytree(tiny_folder / "tiny", tmp_path / "tiny")
    path = tmp_path / "tiny/text_encoder/model.safetensors"
    state = load_file(path)
    embedding = state.pop("shared.weight")
    names = ["shared.weight", "encoder.embed_tokens.weight"] if kept == "both" else [kept]
    path.unlink()
    save_file(state | {name: embedding.clone() for name in names}, path)
    config = dataclasses.replace(config, wan_folder=str(tmp_path))
    torch.testing.assert_close(load_text_encoder(config, BaseModel(config), LENGTH)("a ball"), encoder("a ball"),
                               rtol=0, atol=1e-5)


@torch.inference_mode()
def test_native_layer_is_the_plain_equation(native):
    """y = fc2(gelu(gate·x) · (fc1·x)): gate and fc1, swapped, would load as well. Attention has no scale, and each
    layer its own bias by distance."""
    model = load_text_encoder(native, BaseModel(native), LENGTH).model
    state = torch.load(GOLDEN / "models_t5_umt5-xxl-enc-bf16.pth")
    ids = torch.arange(5, 17)[None]
    x = state["token_embedding.weight"][ids]

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight

    for layer, block in enumerate(model.encoder.block):
        w = {name.removeprefix(f"blocks.{layer}."): value for name, value in state.items()}
        y = norm(x, w["norm1.weight"])
        q, k, v = ((y @ w[f"attn.{part}.weight"].T).unflatten(-1, (4, -1)).transpose(1, 2) for part in "qkv")
        bias = block.layer[0].SelfAttention.bias(ids.shape[1])
        assert torch.equal(block.layer[0].SelfAttention.relative_attention_bias.weight,
                           w["pos_embedding.embedding.weight"])
        attended = (q @ k.transpose(-1, -2) + bias).softmax(-1) @ v
        x = x + attended.transpose(1, 2).flatten(-2) @ w["attn.o.weight"].T
        y = norm(x, w["norm2.weight"])
        gate, value = F.gelu(y @ w["ffn.gate.0.weight"].T, approximate="tanh"), y @ w["ffn.fc1.weight"].T
        x = x + (gate * value) @ w["ffn.fc2.weight"].T
    expected = norm(x, state["norm.weight"])
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-4)


def test_encoder_is_freed_and_comes_back_for_a_new_prompt(tiny_config):
    engine = Engine.from_config(tiny_config)
    known = engine.encode("a ball")
    before = engine.text_encoder
    engine.release_text_encoder()
    assert engine.encode("a ball") is known
    engine.encode("a cube")
    assert engine.text_encoder is not before


def test_encoder_runs_in_the_dtype_of_the_config(tiny_config, encoder):
    config = dataclasses.replace(tiny_config, text_encoder_dtype="bfloat16")
    half = load_text_encoder(config, BaseModel(config), LENGTH)("a red ball")
    assert half.dtype == torch.bfloat16
    expected = encoder("a red ball")
    assert (half.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_tokenizer_that_is_not_there_is_named(tiny_folder, tmp_path, config):
    shutil.copytree(tiny_folder / "tiny", tmp_path / "tiny")
    config = dataclasses.replace(config, wan_folder=str(tmp_path))
    for path in (tmp_path / "tiny/tokenizer").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"tiny/tokenizer: no tokenizer\.json that can be loaded .*; get it with"):
        load_text_encoder(config, BaseModel(config), LENGTH)
    (tmp_path / "tiny/tokenizer").rmdir()
    with pytest.raises(UserError, match=r"tiny/tokenizer: no such folder"):
        load_text_encoder(config, BaseModel(config), LENGTH)
