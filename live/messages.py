"""What clients may ask for: bodies of the HTTP API, and messages of the WebSocket. Unknown keys are errors."""

import json
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from live.limits import Limits
from live.refused import Refused
from utils.config import nearest

LATEST_SECOND = 1_000_000
Refresh = Literal["recache", "keep", "reset"]
Seed = Annotated[int, Field(ge=0, lt=2**63, description="Same seed and prompts, same video.")]
Second = Annotated[float, Field(ge=0, le=LATEST_SECOND)]
Length = Annotated[float, Field(gt=0, le=LATEST_SECOND, description="Seconds of video, where it is not endless.")]
Number = StrictInt | float | StrictBool
Overrides = Annotated[dict[str, Number | list[StrictInt]], Field(
    max_length=20, description="Config keys for this video alone, such as model_kwargs.sink_size.")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _knows_all_fields(cls, given: Any) -> Any:
        """Refuses an unknown field before anything else: what is missing then is often what it was to be."""
        known = list(cls.model_fields)
        for key in given if isinstance(given, dict) else ():
            if key not in known:
                name = key[:60] if key.isidentifier() else ascii(key)[:60]
                hint = nearest(key[:60], known) or f"; known are {', '.join(known)}"
                raise PydanticCustomError("unknown_field", "unknown field {name}{hint}", {"name": name, "hint": hint})
        return given


class NewSession(Strict):
    """A session; it begins with `prompt`, or waits for the first one."""

    prompt: str | None = None
    seed: Seed | None = None
    refresh: Refresh = "recache"
    endless: bool = True
    seconds: Length | None = None
    overrides: Overrides = {}


class NewPrompt(Strict):
    """A prompt for the next block, or for the second `at` of the video."""

    prompt: str
    at: Second | None = None
    refresh: Refresh | None = Field(None, description="What it does to the cache; null: what the session says.")


class Settings(Strict):
    """What to change of a session; what is left out stays."""

    paused: bool | None = None
    endless: bool | None = None
    refresh: Refresh | None = None
    seconds: Length | None = None


class Restart(Strict):
    """A new take with the present prompt; without a seed, with the same one. Scheduled prompts are dropped."""

    seed: Seed | None = None


class NewJob(Strict):
    """A video to be made whole. Times as in a line of a JSONL story, or `seconds` for an even split."""

    prompts: list[str] = Field(min_length=1)
    seconds: float | None = Field(None, gt=0, le=LATEST_SECOND)
    durations: list[float] | None = None
    switch_frame_indices: list[int] | None = None
    num_output_frames: int | None = None
    seed: Seed | None = None
    overrides: Overrides = {}


class PromptMessage(NewPrompt):
    type: Literal["prompt"]
    id: int | None = Field(None, description="Comes back with the answer.")


class CancelMessage(Strict):
    type: Literal["cancel"]
    number: int
    id: int | None = None


class SetMessage(Settings):
    type: Literal["set"]
    id: int | None = None


class RestartMessage(Restart):
    type: Literal["restart"]
    id: int | None = None


class PlayedMessage(Strict):
    """How many frames of a take the player has shown; what is made next depends on it."""

    type: Literal["played"]
    take: int
    frames: int = Field(ge=0)


Message = PromptMessage | CancelMessage | SetMessage | RestartMessage | PlayedMessage
_MESSAGE: TypeAdapter = TypeAdapter(Annotated[Message, Field(discriminator="type")])


def parse(text: str) -> Message:
    """A message of the WebSocket. Raises Refused for one that is none."""
    try:
        return _MESSAGE.validate_json(text)
    except ValidationError as error:
        raise Refused(422, explain(error.errors())) from None
    except (ValueError, RecursionError):
        raise Refused(422, "that is no message") from None


def id_of(text: str) -> int | None:
    """The id of a message that is refused, so that its sender knows which one it was; None where none can be read."""
    try:
        identity = json.loads(text)["id"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return identity if type(identity) is int else None


def explain(errors: list[dict]) -> str:
    """The first of pydantic's complaints, in a line."""
    first = errors[0]
    kind, place = first["type"], [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    if kind == "json_invalid" and first["loc"][:1] == ("body",):
        return f"the body is no JSON: {first['ctx']['error']}, at character {first['loc'][-1]}"
    if not place and isinstance(first["input"], bytes):
        return "send the body with the header Content-Type: application/json"
    if not place and kind in ("missing", "model_attributes_type", "dict_type"):
        return 'needed is a JSON object, such as {"prompt": "a red ball"}'
    where = ".".join(place)[:100]
    if kind == "missing":
        return f"{where} is needed"
    line = f"{where}: {first['msg'][:300]}" if where else first["msg"][:300]
    return line.encode(errors="backslashreplace").decode()  # a key may have half a character


def check_prompt(prompt: str, limits: Limits) -> str:
    """A prompt without white space around it. Raises Refused for one that is empty, too long or not text."""
    prompt = prompt.strip()
    if not prompt:
        raise Refused(422, "the prompt is empty; write what the video should show")
    if len(prompt) > limits.prompt_characters:
        raise Refused(422, f"the prompt has {len(prompt)} characters, at most {limits.prompt_characters} are taken")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise Refused(422, "the prompt has half a character (a surrogate); write it anew")
    return prompt


def check_seconds(seconds: float | None, limits: Limits) -> float | None:
    """A length, or a place in a video. Raises Refused for one beyond the longest video."""
    if seconds is not None and seconds > limits.session_seconds:
        raise Refused(422, f"second {seconds:g} is beyond the {limits.session_seconds:g} s that a video may have here")
    return seconds
