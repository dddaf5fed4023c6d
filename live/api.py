"""The HTTP API: sessions and jobs. Its description is at /openapi.json, for people at /docs."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from pathlib import Path

from fastapi import APIRouter, WebSocket
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from live import wire
from live.answers import Health, JobState, PromptAnswer, SessionEntry, SessionState
from live.messages import NewJob, NewPrompt, NewSession, Restart, Settings, check_prompt, check_seconds
from live.metrics import Metrics
from live.packets import HEADER
from live.refused import Refused
from live.settings import OWN
from live.show import Show
from live.studio import Studio
from live.viewer import Viewer
from pipeline.session import REFRESHES
from utils.prompts import Story

CHUNK = 1 << 18  # bytes
REFUSALS = {status: {"description": about, "content": {"application/json": {"example": {"detail": "why"}}}}
            for status, about in ((403, "Needs a token"), (404, "No such session or job"), (409, "Not possible now"),
                                  (422, "Bad values"), (429, "Too many"))}


def routes(studio: Studio, suggestions: list[str], may_list: bool) -> APIRouter:
    """All paths of the API. may_list: whether all sessions and jobs are told to whoever asks: only where a token keeps
    others out, since without one the ids are what keeps other users of the machine from them."""
    router = APIRouter(responses=REFUSALS)
    config, limits = studio.config, studio.limits

    @router.get("/health", tags=["server"], response_model=Health)
    async def health(response: Response) -> dict:
        """Whether the model is loaded; 503 while it is not."""
        about = studio.health()
        response.status_code = 200 if about["status"] == "ready" else 503
        return about

    @router.get("/metrics", tags=["server"], response_class=PlainTextResponse)
    async def metrics() -> str:
        """Figures for Prometheus."""
        return await run_in_threadpool(studio.metrics.text)

    @router.get("/api/info", tags=["server"])
    async def info() -> dict:
        """The model's picture, what can be chosen, and this server's limits."""
        return {"width": config.width, "height": config.height, "fps": config.fps, "seed": config.seed,
                "refresh": list(REFRESHES), "own_settings": list(OWN), "suggestions": suggestions,
                "limits": {"prompt_characters": limits.prompt_characters, "sessions": limits.sessions,
                           "session_seconds": limits.session_seconds, "idle_seconds": limits.idle_seconds,
                           "lead_seconds": limits.lead_seconds}, **studio.health()}

    @router.post("/api/sessions", status_code=201, tags=["sessions"], response_model=SessionState,
                 response_model_exclude_unset=True)
    async def create_session(body: NewSession) -> dict:
        """A new live session. It is made as long as someone watches: the page, the WebSocket or the stream."""
        prompt = None if body.prompt is None else check_prompt(body.prompt, limits)
        seconds = check_seconds(body.seconds, limits)
        show = await run_in_threadpool(studio.create_show, body.overrides, body.seed)
        show.set(endless=body.endless, refresh=body.refresh, seconds=seconds)
        if prompt is not None:
            show.ask(prompt)
        return show.state(whole=True)

    def check_may_list() -> None:
        if not may_list:
            raise Refused(403, "lists are told by servers with a token only: without one, ids are the only secrets; "
                               "start it with LONGLIVE_TOKEN")

    @router.get("/api/sessions", tags=["sessions"], response_model=list[SessionEntry])
    async def sessions() -> list[dict]:
        """All sessions, on a server with a token."""
        check_may_list()
        return [show.state() for show in studio.shows()]

    @router.get("/api/sessions/{identity}", tags=["sessions"], response_model=SessionState,
                 response_model_exclude_unset=True)
    async def session_state(identity: str) -> dict:
        """All there is to say of a session, every prompt so far included."""
        show = studio.show(identity)
        show.seen()
        return {**show.state(whole=True), "server": studio.health()}

    @router.patch("/api/sessions/{identity}", tags=["sessions"], response_model=SessionState,
                  response_model_exclude_unset=True)
    async def change_session(identity: str, body: Settings) -> dict:
        """Pauses it or lets it go on, and changes settings."""
        show = studio.show(identity)
        show.set(paused=body.paused, endless=body.endless, refresh=body.refresh,
                 seconds=check_seconds(body.seconds, limits))
        return show.state()

    @router.delete("/api/sessions/{identity}", status_code=204, tags=["sessions"])
    async def end_session(identity: str) -> None:
        """Ends it. Its recording stays on the server's disk until room is needed."""
        await run_in_threadpool(studio.end_show, identity)

    @router.post("/api/sessions/{identity}/prompts", status_code=202, tags=["sessions"], response_model=PromptAnswer)
    async def send_prompt(identity: str, body: NewPrompt) -> dict:
        """A prompt for the next block, or with `at` for a second of the video that is not made yet."""
        show = studio.show(identity)
        return show.ask(check_prompt(body.prompt, limits), body.refresh, check_seconds(body.at, limits))

    @router.delete("/api/sessions/{identity}/prompts/{number}", status_code=204, tags=["sessions"])
    async def take_prompt_back(identity: str, number: int) -> None:
        """Takes back a prompt that still waits."""
        studio.show(identity).cancel(number)

    @router.post("/api/sessions/{identity}/restart", tags=["sessions"], response_model=SessionState,
                 response_model_exclude_unset=True)
    async def restart(identity: str, body: Restart) -> dict:
        """Begins the video anew with the present prompt, and with another seed where one is given. Scheduled prompts
        are dropped."""
        show = studio.show(identity)
        show.restart(body.seed)
        return show.state()

    @router.get("/api/sessions/{identity}/stream", tags=["sessions"], response_class=StreamingResponse,
                responses={200: {"content": {"multipart/x-mixed-replace": {}}}})
    async def stream(identity: str) -> StreamingResponse:
        """The video as it is made, as Motion JPEG: an <img>, VLC or ffmpeg shows it."""
        show = studio.show(identity)
        viewer = Viewer(asyncio.get_running_loop(), show.lead + 2 * show.block_frames)
        show.attach(viewer)
        return StreamingResponse(_motion_jpeg(show, viewer, studio.metrics),
                                 media_type="multipart/x-mixed-replace; boundary=frame")

    @router.get("/api/sessions/{identity}/video.mp4", tags=["sessions"], response_class=StreamingResponse,
                responses={200: {"content": {"video/mp4": {}}}})
    async def session_video(identity: str) -> Response:
        """The video so far."""
        return await _file(studio.show(identity).video(), "video/mp4")

    @router.get("/api/sessions/{identity}/video.json", tags=["sessions"])
    async def session_description(identity: str) -> Response:
        """How the video.mp4 that was fetched last was made; `inference.py --remake` makes it again from this."""
        return await _file(studio.show(identity).description(), "application/json")

    @router.post("/api/jobs", status_code=202, tags=["jobs"], response_model=JobState)
    async def create_job(body: NewJob) -> dict:
        """A video to be made whole, in the time that live sessions leave."""
        prompts = [check_prompt(prompt, limits) for prompt in body.prompts]
        story = Story(prompts, body.switch_frame_indices, body.durations, body.num_output_frames, body.seed,
                      where="job")
        frames = None if body.seconds is None else max(1, round(body.seconds * config.fps))
        job = await run_in_threadpool(studio.create_job, story, frames, body.overrides)
        return job.state()

    @router.get("/api/jobs", tags=["jobs"], response_model=list[JobState])
    async def jobs() -> list[dict]:
        """All jobs, on a server with a token."""
        check_may_list()
        return [job.state() for job in studio.jobs()]

    @router.get("/api/jobs/{identity}", tags=["jobs"], response_model=JobState)
    async def job_state(identity: str) -> dict:
        """How far it is: queued, running, done, failed or cancelled."""
        return studio.job(identity).state()

    @router.get("/api/jobs/{identity}/video.mp4", tags=["jobs"], response_class=StreamingResponse,
                responses={200: {"content": {"video/mp4": {}}}})
    async def job_video(identity: str) -> Response:
        """The video, once it is done."""
        return await _file(studio.job(identity).file(".mp4"), "video/mp4")

    @router.get("/api/jobs/{identity}/video.json", tags=["jobs"])
    async def job_description(identity: str) -> Response:
        """How the video was made."""
        return await _file(studio.job(identity).file(".json"), "application/json")

    @router.delete("/api/jobs/{identity}", status_code=204, tags=["jobs"])
    async def end_job(identity: str) -> None:
        """Cancels a job, or forgets one that is done."""
        await run_in_threadpool(studio.end_job, identity)

    @router.websocket("/api/sessions/{identity}/live")
    async def live(socket: WebSocket, identity: str) -> None:
        await wire.serve(socket, studio, identity)

    return router


async def _file(path: Future, kind: str) -> Response:
    """A file that the server made, as a download. It is opened at once, so that it may go meanwhile."""
    found: Path | None = await asyncio.wrap_future(path)
    try:
        file = None if found is None else found.open("rb")
    except OSError:
        file = None
    if file is None:
        raise Refused(404, "there is no video of it yet, or no more")
    headers = {"content-disposition": f'attachment; filename="{found.name}"',
               "content-length": str(os.fstat(file.fileno()).st_size)}

    def chunks() -> Iterator[bytes]:
        with file:
            while chunk := file.read(CHUNK):
                yield chunk

    return StreamingResponse(chunks(), media_type=kind, headers=headers)


async def _motion_jpeg(show: Show, viewer: Viewer, metrics: Metrics) -> AsyncIterator[bytes]:
    """Parts of a multipart answer, a frame each, no faster than they are to be seen."""
    clock = asyncio.get_running_loop().time
    due = clock()
    try:
        while True:
            item = await viewer.next()
            if not isinstance(item, tuple):
                continue
            packet, asked_at = item
            _, _, take, frame, _, _ = HEADER.unpack_from(packet)
            jpeg = packet[HEADER.size:]
            due = max(due + 1 / show.config.fps, clock())
            await asyncio.sleep(due - clock())
            part = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%b\r\n" % (len(jpeg), jpeg)
            metrics.sent(len(part), asked_at)
            yield part
            show.report(viewer, take, frame + 1)
    except ConnectionAbortedError:
        yield b"--frame--\r\n"
    finally:
        show.detach(viewer)
