import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPOSITORY
from utils.config import Adapter, Config, LoraFile, ModelKwargs, known_keys, load_config
from utils.errors import UserError

DATA = Path(__file__).parent / "data"
SHIPPED = sorted((REPOSITORY / "configs").glob("*.yaml"))

LONGLIVE = Config(
    denoising_step_list=[1000, 750, 500, 250], warp_denoising_step=True, num_frame_per_block=3,
    model_name="Wan2.1-T2V-1.3B",
    model_kwargs=ModelKwargs(local_attn_size=12, timestep_shift=5.0, sink_size=3, use_infinite_attention=False),
    data_path="longlive_models/prompts/vidprom_filtered_extended.txt", output_folder="videos/long", inference_iter=-1,
    num_output_frames=120, use_ema=False, seed=0, num_samples=1, save_with_index=True, global_sink=True,
    context_noise=0, switch_frame_indices=None, generator_ckpt="longlive_models/models/longlive_base.pt",
    lora_ckpt="longlive_models/models/lora.pt",
    adapter=Adapter(type="lora", rank=256, alpha=256, dropout=0.0, dtype="bfloat16", verbose=False),
)


def test_longlive_inference_yaml_loads_as_it_is():
    assert load_config(DATA / "longlive_inference.yaml") == LONGLIVE


def test_longlive_interactive_yaml_loads_as_it_is():
    assert load_config(DATA / "longlive_interactive_inference.yaml") == dataclasses.replace(
        LONGLIVE, data_path="longlive_models/prompts/interactive_example.jsonl", output_folder="videos/interactive",
        num_output_frames=240, seed=1, global_sink=False, switch_frame_indices=[40, 80, 120, 160, 200])


def test_longlive_infinity_yaml_loads_as_it_is():
    assert load_config(DATA / "longlive_inference_infinity.yaml") == dataclasses.replace(
        LONGLIVE, model_kwargs=dataclasses.replace(LONGLIVE.model_kwargs, use_infinite_attention=True),
        output_folder="videos/long_infinity", num_output_frames=1920)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_config_loads_and_has_what_it_says(path):
    def holds(part: dict, whole: dict) -> bool:
        return all(holds(value, whole[key]) if isinstance(value, dict) else whole[key] == value
                   for key, value in part.items())

    assert holds(yaml.safe_load(path.read_text("utf-8")), load_config(path).to_dict())


def written() -> dict:
    return yaml.safe_load((REPOSITORY / "configs/inference.yaml").read_text("utf-8"))


def test_inference_yaml_names_every_key():
    keys = []
    for key, value in written().items():
        keys += [f"{key}.{inner}" for inner in value] if isinstance(value, dict) else [key]
    assert sorted(keys) == sorted(known_keys())


def test_inference_yaml_has_each_key_at_its_default_except_the_files():
    got, default = load_config(REPOSITORY / "configs/inference.yaml").to_dict(), Config().to_dict()
    assert {key for key in got if got[key] != default[key]} == {"data_path", "generator_ckpt", "lora_ckpt"}


def test_without_a_file_the_defaults_hold():
    assert load_config() == Config()


def test_overrides_go_before_the_file():
    config = load_config(DATA / "longlive_inference.yaml", [
        "seed=7", "model_kwargs.sink_size=6", "denoising_step_list=[1000,500]", "lora_ckpt=null",
        "switch_frame_indices=40, 80", "output_folder=my videos",
    ])
    assert config == dataclasses.replace(
        LONGLIVE, seed=7, model_kwargs=ModelKwargs(sink_size=6), denoising_step_list=[1000, 500], lora_ckpt=None,
        switch_frame_indices=[40, 80], output_folder="my videos")


def test_description_beside_a_video_is_a_config_too(tmp_path):
    path = tmp_path / "0000-0.json"
    path.write_text(json.dumps({"config": LONGLIVE.to_dict(), "request": {"seed": 5}, "complete": True}))
    assert load_config(path) == LONGLIVE


@pytest.mark.parametrize(("given", "indices"), [
    ("null", None), ("[40, 80]", [40, 80]), ("40, 80", [40, 80]), ("40 80", [40, 80]), ("40,80,", [40, 80]),
    ("40", [40]), ("'40'", [40]), ("[]", []),
])
def test_switch_frame_indices_in_every_spelling(tmp_path, given, indices):
    path = tmp_path / "config.yaml"
    path.write_text(f"switch_frame_indices: {given}\n")
    assert load_config(path).switch_frame_indices == indices


def test_window_of_minus_one_keeps_everything():
    assert load_config(overrides=["model_kwargs.local_attn_size=-1"]).window is None
    assert load_config(overrides=["model_kwargs.local_attn_size=15"]).window == 15


def test_loras_are_complete():
    config = Config(lora_ckpt=["a.pt", {"path": "b.pt", "weight": 0.5, "rank": 8, "alpha": 0},
                               {"path": "c.pt", "alpha": 16}], adapter=Adapter(rank=4, alpha=2))
    assert config.loras == [LoraFile("a.pt", 1.0, 4, 2), LoraFile("b.pt", 0.5, 8, 0), LoraFile("c.pt", 1.0, 4, 16)]
    assert Config(lora_ckpt="a.pt").loras == [LoraFile("a.pt", 1.0, 256, 256)]
    assert Config().loras == []


@pytest.mark.parametrize(("override", "words"), [
    ("sinksize=3", "unknown key sinksize; did you mean model_kwargs.sink_size?"),
    ("sink_size=3", "unknown key sink_size; did you mean model_kwargs.sink_size?"),
    ("model_kwargs.sink=3", "unknown key model_kwargs.sink; did you mean model_kwargs.sink_size?"),
    ("rank=3", "did you mean adapter.rank?"),
    ("num_frames_per_block=3", "did you mean num_frame_per_block?"),
    ("zzzz=3", "unknown key zzzz, see configs/inference.yaml"),
    ("seed=one", "seed: Value 'one'"),
    ("seed=1.5", "seed: Value '1.5'"),
    ("seed=null", "seed: "),
    ("num_samples=[1]", "num_samples: "),
    ("denoising_step_list=[1000,x]", "denoising_step_list[1]: Value 'x'"),
    ("model_kwargs=3", "model_kwargs holds keys of its own"),
    ("seed", "override 'seed' is not key=value, for example seed=1"),
])
def test_key_that_is_unknown_or_of_the_wrong_type(tmp_path, override, words):
    with pytest.raises(UserError) as error:
        load_config(overrides=[override])
    assert words in str(error.value) and "\n" not in str(error.value)
    if "=" in override and "." not in override.split("=")[0]:
        path = tmp_path / "my.yaml"
        path.write_text(override.replace("=", ": ", 1))
        with pytest.raises(UserError) as error:
            load_config(path)
        assert words in str(error.value) and str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize(("text", "words"), [
    ("seed: [1", "not valid YAML"), ("- seed", "a config is a YAML mapping"), ("\tseed: 1", "not valid YAML"),
])
def test_file_that_is_no_config(tmp_path, text, words):
    path = tmp_path / "my.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as error:
        load_config(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"other.yaml: no such file"):
        load_config(tmp_path / "other.yaml")


OUT_OF_RANGE = [
    ("denoising_step_list=[]", ["denoising_step_list=[]", "[1000, 750, 500, 250]"]),
    ("denoising_step_list=[250,500]", ["falling"]),
    ("denoising_step_list=[500,500]", ["falling"]),
    ("denoising_step_list=[1001,500]", ["at most 1000"]),
    ("denoising_step_list=[1000,0]", ["above 0"]),
    ("num_frame_per_block=0", ["num_frame_per_block=0", "at least 1 latent"]),
    ("num_output_frames=0", ["num_output_frames=0", "at least 1 latent"]),
    ("num_samples=0", ["num_samples=0", "at least 1"]),
    ("inference_iter=0", ["inference_iter=0", "-1 (all) or at least 1"]),
    ("inference_iter=-2", ["inference_iter=-2"]),
    ("seed=-1", ["seed=-1", "from 0 to 2^63-1"]),
    (f"seed={2**63}", ["2^63-1"]),
    ("context_noise=-0.5", ["context_noise=-0.5", "0 to 1000"]),
    ("context_noise=1001", ["context_noise=1001"]),
    ("context_noise=nan", ["context_noise=nan"]),
    ("model_kwargs.timestep_shift=0", ["model_kwargs.timestep_shift=0", "above 0"]),
    ("model_kwargs.timestep_shift=inf", ["model_kwargs.timestep_shift=inf"]),
    ("adapter.type=dora", ["adapter.type=dora", "lora"]),
    ("adapter.rank=0", ["adapter.rank=0", "at least 1"]),
    ("fps=0", ["fps=0", "at least 1"]),
    ("crf=-1", ["crf=-1", "0 (lossless) to 51"]),
    ("crf=52", ["crf=52"]),
    ("height=100", ["height=100", "multiple of 16; use 96 or 112"]),
    ("width=8", ["width=8", "use 16 or 32"]),
    ("width=0", ["width=0", "use 16 or 32"]),
    ("dtype=float64", ["dtype=float64", "auto, bfloat16, float16, float32"]),
    ("precision=fp4", ["precision=fp4", "full or fp8"]),
    ("text_encoder_dtype=auto", ["text_encoder_dtype=auto", "bfloat16, float16, float32"]),
    ("vae=tae", ["vae=tae", "wan or taehv"]),
    ("vae=taehv", ["vae_ckpt", "taew2_1.pth"]),
    ("num_output_frames=100", ["num_output_frames=100", "num_frame_per_block=3", "use 99 or 102"]),
    ("num_output_frames=2", ["num_output_frames=2", "use 3"]),
    ("model_kwargs.local_attn_size=2", ["model_kwargs.local_attn_size=2", "at least num_frame_per_block=3", "-1"]),
    ("model_kwargs.local_attn_size=0", ["model_kwargs.local_attn_size=0"]),
    ("model_kwargs.sink_size=4", ["model_kwargs.sink_size=4", "num_frame_per_block=3", "use 3 or 6"]),
    ("model_kwargs.sink_size=-3", ["model_kwargs.sink_size=-3", "use 0 or 3"]),
    ("model_kwargs.sink_size=12", ["local_attn_size=12", "sink_size=12", "positive multiple", "use 15 or 18"]),
    ("model_kwargs.local_attn_size=10", ["local_attn_size=10", "sink_size=3", "use 9 or 12"]),
    ("lora_ckpt=3", ["lora_ckpt must be a path, or a list", "got 3"]),
    ("lora_ckpt=[a.pt,4]", ["lora_ckpt", "got 4"]),
    ("lora_ckpt=[{weight: 0.5}]", ["lora_ckpt", "path", "0.5"]),
    ("lora_ckpt=[{path: a.pt, wight: 0.5}]", ["lora_ckpt: unknown key wight; did you mean weight?"]),
    ("lora_ckpt=[{path: a.pt, weight: much}]", ["lora_ckpt", "much"]),
    ("lora_ckpt=[{path: a.pt, rank: 0}]", ["lora_ckpt: rank=0", "at least 1"]),
    ("switch_frame_indices=[4,a]", ["switch_frame_indices=[4, 'a']", "whole numbers"]),
    ("switch_frame_indices=[4.5]", ["whole numbers"]),
    ("switch_frame_indices=[0,4]", ["switch_frame_indices=[0, 4]", "rise from above 0"]),
    ("switch_frame_indices=[8,4]", ["rise"]),
]


@pytest.mark.parametrize(("override", "words"), OUT_OF_RANGE)
def test_value_out_of_range_says_what_is_wrong_and_what_would_do(override, words):
    with pytest.raises(UserError) as error:
        load_config(overrides=[override])
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("overrides", [
    ["num_output_frames=99"], ["num_output_frames=3"], ["height=96", "width=16"], ["model_kwargs.sink_size=0"],
    ["model_kwargs.sink_size=9"], ["model_kwargs.local_attn_size=15", "model_kwargs.sink_size=12"],
    ["model_kwargs.local_attn_size=-1", "model_kwargs.sink_size=6"], ["denoising_step_list=[1]"],
    ["context_noise=1000"], [f"seed={2**63 - 1}"], ["crf=0"], ["crf=51"], ["vae=taehv", "vae_ckpt=a.pth"],
    ["num_frame_per_block=4", "model_kwargs.local_attn_size=8", "model_kwargs.sink_size=4"], ["inference_iter=1"],
])
def test_values_at_the_edge_are_taken(overrides):
    load_config(overrides=overrides)


# Another value for every key there is.
CHANGED = {
    "denoising_step_list": [1000, 500], "warp_denoising_step": False, "num_frame_per_block": 1, "model_name": "other",
    "model_kwargs.local_attn_size": 15, "model_kwargs.timestep_shift": 3.0, "model_kwargs.sink_size": 6,
    "model_kwargs.use_infinite_attention": True, "data_path": "other.txt", "output_folder": "elsewhere",
    "inference_iter": 5, "num_output_frames": 60, "use_ema": True, "seed": 1, "num_samples": 2,
    "save_with_index": False, "switch_frame_indices": [30], "global_sink": False, "context_noise": 10.0,
    "generator_ckpt": "other.pt", "lora_ckpt": "other.pt", "adapter.rank": 8, "adapter.alpha": 8.0,
    "adapter.dropout": 0.5, "adapter.dtype": "float32", "adapter.verbose": True, "wan_folder": "other", "height": 240,
    "width": 416, "fps": 8, "device": "cpu", "dtype": "float32", "text_encoder_device": "cpu",
    "text_encoder_dtype": "float32", "precision": "fp8", "vae": "taehv", "vae_ckpt": "vae.pth", "cache_merged": False,
    "cuda_graphs": False, "crf": 30,
}
SAME_VIDEO = {
    "data_path", "output_folder", "inference_iter", "num_output_frames", "seed", "num_samples", "save_with_index",
    "switch_frame_indices", "adapter.dropout", "adapter.dtype", "adapter.verbose", "device", "text_encoder_device",
    "cache_merged", "cuda_graphs",
}


def changed(config: Config, key: str) -> Config:
    outer, _, inner = key.partition(".")
    value = CHANGED[key]
    if inner:
        value = dataclasses.replace(getattr(config, outer), **{inner: value})
    more = {"vae_ckpt": "vae.pth"} if key == "vae" else {}
    return dataclasses.replace(config, **{outer: value}, **more)


def test_every_key_is_tried():
    assert CHANGED.keys() | {"adapter.type"} == set(known_keys())  # a type has only one value


@pytest.mark.parametrize("key", CHANGED)
def test_identity_holds_what_decides_the_look_and_nothing_else(key):
    assert (changed(LONGLIVE, key).identity() == LONGLIVE.identity()) == (key in SAME_VIDEO)


def test_full_precision_goes_without_saying():
    """So that a video from before the key is still the one that is asked for."""
    assert "precision" not in Config().identity() and Config(precision="fp8").identity()["precision"] == "fp8"


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_fp8_computes_the_rest_in_bfloat16(dtype):
    load_config(overrides=["precision=fp8", "dtype=bfloat16"])
    with pytest.raises(UserError, match=f"^dtype={dtype} must be auto or bfloat16 where precision is fp8$"):
        load_config(overrides=["precision=fp8", f"dtype={dtype}"])


@pytest.mark.parametrize("more", [{"weight": 0.5}, {"rank": 8}, {"alpha": 8}])
def test_identity_holds_each_lora_with_its_numbers(more):
    def identity(**entry):
        return Config(lora_ckpt=[{"path": "a.pt", **entry}]).identity()

    assert identity() == Config(lora_ckpt="a.pt").identity()
    assert identity(**more) != identity()
    assert identity(weight=1.0, rank=256, alpha=256) == identity()


def test_identity_can_be_kept_as_json():
    identity = Config(lora_ckpt=["a.pt", {"path": "b.pt", "weight": 0.5}]).identity()
    assert json.loads(json.dumps(identity)) == identity


@pytest.mark.parametrize(("of", "key"), [(lambda c: c, "seed"), (lambda c: c.model_kwargs, "sink_size"),
                                         (lambda c: c.adapter, "rank")])
def test_config_is_frozen(of, key):
    config = load_config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(of(config), key, 5)
    assert config == Config()
