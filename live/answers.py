"""What the server answers: the models that describe it in /openapi.json, with units."""

from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, Field
from pydantic.json_schema import models_json_schema

from live.messages import CancelMessage, PlayedMessage, PromptMessage, RestartMessage, SetMessage

REFERENCE = "#/components/schemas/{model}"
SENT = (PromptMessage, CancelMessage, SetMessage, RestartMessage, PlayedMessage)
BINARY = ("Each binary message is a frame: a header of 20 bytes, little-endian, and a JPEG. The header: version "
          "(uint8, 1), flags (uint8; 1: the first frame under its prompt, 2: a still, not to be played), take "
          "(uint16), frame (uint32), number of its prompt (uint32), Unix time it was made (float64, seconds).")


class Health(BaseModel):
    status: Literal["loading", "ready", "failed"]
    stage: str = Field(description="What is being loaded.")
    message: str = Field(description="Why loading failed.")
    loading_seconds: float = Field(description="Since loading began; 0 once all is loaded.")
    gpu_bytes: int = Field(description="GPU memory in use; 0 without a GPU.")
    host_bytes: int = Field(description="Memory of the process.")


class NextPrompt(BaseModel):
    number: int
    prompt: str


class PlannedPrompt(NextPrompt):
    latent: int = Field(description="Asked for from this latent on; 4 frames each.")
    refresh: str
    second: float = Field(description="Of the video: when the first block under it is seen.")


class ShownPrompt(PlannedPrompt):
    latent: int = Field(description="Took hold at this latent; 4 frames each.")
    frame: int = Field(description="The first one under it.")


class SessionState(BaseModel):
    """A session. The WebSocket sends it whenever it changes, and every 5 seconds in any case."""

    type: Literal["state"]
    id: str = Field(description="A secret: whoever knows it can watch and steer the session.")
    take: int = Field(description="Number of the take; a restart begins the next one.")
    status: Literal["failed", "paused", "ended", "waiting", "unwatched", "generating"] = Field(
        description="waiting: for a first prompt; unwatched: nothing is made until someone watches.")
    message: str = Field(description="Why it failed or ended.")
    seed: int
    refresh: str = Field(description="What a prompt that says nothing of it does to the cache.")
    endless: bool
    paused: bool
    frames: int = Field(description="Made so far.")
    seconds: float = Field(description="Of video, made so far.")
    length: int = Field(description="Frames after which it ends where it is not endless.")
    fps: int = Field(description="Frames a second that it plays at.")
    width: int = Field(description="Pixels.")
    height: int = Field(description="Pixels.")
    block_frames: int = Field(description="Frames that are made at a time.")
    prompt: str | None = Field(description="The present one.")
    number: int = Field(description="Of the present prompt; 0 before the first.")
    next: NextPrompt | None = Field(description="Takes hold with the next block.")
    prompts: list[ShownPrompt] = Field(description="That took hold; all of them, or the newest 20.")
    scheduled: list[PlannedPrompt] = Field(description="That wait for their time.")
    frames_per_second: float = Field(description="Running mean of the speed at which frames are made.")
    block_seconds: float = Field(description="Running mean of the seconds that computing a block takes.")
    turn_seconds: float = Field(description="Running mean of the seconds from when a block is needed until it is made: "
                                            "computing it, and waiting for the turns of others.")
    viewers: int
    recorded: int = Field(description="Frames.")
    recording: str = Field(description="Why recording stopped; empty while it goes on.")
    server: Health | None = None


class SessionEntry(BaseModel):
    id: str
    status: str
    seconds: float = Field(description="Of video, made so far.")
    viewers: int
    prompt: str | None


class PromptAnswer(BaseModel):
    number: int = Field(description="The prompt's; frames and states say it.")
    frame: int | None = Field(description="For a prompt with `at`: the first frame under it. Later where other work "
                                          "keeps its text from being encoded in time. null: with the next block.")
    second: float | None = Field(description="The same in seconds of the video.")


class Segment(BaseModel):
    prompt: str
    latent: int = Field(description="Where it takes hold; 4 frames each.")
    frame: int = Field(description="The first one under it.")
    second: float = Field(description="Of the video.")
    asked_latent: int


class JobState(BaseModel):
    id: str
    status: Literal["queued", "running", "done", "failed", "cancelled"]
    message: str = Field(description="Why it failed.")
    frames: int = Field(description="Made so far.")
    of: int = Field(description="Frames that it will have.")
    progress: float = Field(description="From 0 to 1.")
    seed: int
    plan: list[Segment]


class OkMessage(BaseModel):
    """A message was obeyed; after a prompt with what the HTTP API answers too."""

    type: Literal["ok"]
    id: int | None = Field(description="Of the message that it answers.")
    number: int | None = None
    frame: int | None = None
    second: float | None = None


class ErrorMessage(BaseModel):
    """A message was refused."""

    type: Literal["error"]
    id: int | None = Field(description="Of the message that it answers; null where that has none or can't be read.")
    message: str = Field(description="Why, in a line.")


def describe_websocket(app: FastAPI) -> None:
    """Adds to openapi.json what OpenAPI has no place for: the messages of the WebSocket, under `x-websocket`."""
    plain = app.openapi

    def whole() -> dict[str, Any]:
        if app.openapi_schema is None:
            received = (SessionState, OkMessage, ErrorMessage)
            _, told = models_json_schema([(model, "validation") for model in (*SENT, *received)],
                                         ref_template=REFERENCE)
            description = plain()
            schemas = description["components"]["schemas"]
            description["components"]["schemas"] = told["$defs"] | schemas
            description["x-websocket"] = {"/api/sessions/{identity}/live": {
                "description": "Frames and the state come, messages go. Send `played` as frames are shown, several "
                               "times a second: no more is made than a lead ahead of it.",
                "binary": BINARY,
                "send": [{"$ref": REFERENCE.format(model=model.__name__)} for model in SENT],
                "receive": [{"$ref": REFERENCE.format(model=model.__name__)} for model in received],
            }}
        return app.openapi_schema

    app.openapi = whole
