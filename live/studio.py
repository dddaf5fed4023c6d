"""The engine, the one thread that generates, and whom it generates for."""

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from live.jobs import JobRun
from live.limits import Limits
from live.metrics import Metrics
from live.recording import Recording
from live.refused import Refused
from live.settings import own_config
from live.show import Show, words_for
from live.storage import Storage
from live.take import Take
from pipeline.engine import Engine
from utils.config import Config
from utils.errors import UserError
from utils.prompts import Story
from utils.report import resident
from wan.geometry import frames_of

log = logging.getLogger(__name__)

EMBEDDINGS_KEPT = 256
JOB_TURNS = 4  # a job gets at least one of so many turns, however busy the live sessions are
LOOK_AGAIN = 0.5  # seconds; whatever makes someone ready also wakes the thread


class Studio:
    """Loads the engine, then gives sessions and jobs their turns, a block each.

    load: the engine, given a function that is told what is being loaded. weights: marks of the weight files, for the
    descriptions of recordings.
    """

    def __init__(self, config: Config, limits: Limits, storage: Storage,
                 load: Callable[[Callable[[str], None]], Engine], weights: dict[str, str]):
        self.config, self.limits, self.storage = config, limits, storage
        self.metrics = Metrics()
        self.stage, self.failure = "engine", ""  # what is being loaded, "" once all is; why that failed
        self._load, self._weights = load, weights
        self._engine: Engine | None = None
        self._loaded = threading.Event()
        self._began = time.monotonic()
        self._text = ThreadPoolExecutor(1, "text")
        self._text_stream: torch.cuda.Stream | None = None
        self._lock = threading.Lock()
        self._shows: dict[str, Show] = {}
        self._jobs: dict[str, JobRun] = {}
        self._turns = 0
        self._last: dict[type, str] = {}  # whose turn it was last
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._add_gauges()

    # Life

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends all sessions and jobs; their recordings are whole when this returns."""
        self._stopping.set()
        self._wake.set()
        self._loaded.set()
        with self._lock:
            shows, jobs = list(self._shows.values()), list(self._jobs.values())
        for show in shows:
            show.close("the server stops")
        for job in jobs:
            if job.active:
                job.cancel()
        self._text.shutdown(wait=False, cancel_futures=True)
        if self._thread.is_alive():
            self._thread.join(60 if self._engine is not None else 1)

    def _run(self) -> None:
        try:
            engine = self._load(self._loading)
            self._loading("text encoder")
            prompts = first_blocks(self.config, engine.device)
            engine.encode(prompts[0])
            self._loading("first blocks")
            session = engine.session(seed=0)
            for prompt in prompts:
                if self._stopping.is_set():
                    return
                session.set_prompt(prompt)
                session.step()
            del session
        except Exception as error:
            self.failure = "loading failed; the server's log says why"  # which may name files
            log.error("%s", error, exc_info=not isinstance(error, UserError))
            return
        if engine.device.type == "cuda":
            self._text_stream = torch.cuda.Stream(engine.device)
        self._engine = engine
        self.stage = ""
        self._loaded.set()
        log.info("Ready after %.1f s, on %s", time.monotonic() - self._began, engine.device)
        self._tell_all()
        while not self._stopping.is_set():
            self._wake.clear()
            if (one := self._next()) is None:
                self._wake.wait(LOOK_AGAIN)
                continue
            try:
                one.step(engine)
            except Exception as error:
                log.exception("%s %s fails", type(one).__name__, one.id)
                self.metrics.failures.add()
                one.fail(words_for(error))

    def _loading(self, stage: str) -> None:
        self.stage = stage
        log.info("Loading: %s", stage)
        self._tell_all()

    def _tell_all(self) -> None:
        for show in self.shows():
            show.changed()

    def _next(self) -> Show | JobRun | None:
        """Whose turn it is: of those that are ready the one after the last; sessions before jobs, but jobs get their
        share too."""
        with self._lock:
            shows, jobs = list(self._shows.values()), list(self._jobs.values())
        show, job = self._after(Show, shows), self._after(JobRun, [job for job in jobs if job.active])
        self._turns += 1
        one = job if show is None or (job is not None and self._turns % JOB_TURNS == 0) else show
        if one is not None:
            self._last[type(one)] = one.id
        return one

    def _after(self, kind: type, ring: list) -> Show | JobRun | None:
        ids = [one.id for one in ring]
        start = ids.index(self._last[kind]) + 1 if self._last.get(kind) in ids else 0
        ready = [one.ask_for_turn() for one in ring]  # all of them: each notes since when it asks
        order = [*range(start, len(ring)), *range(start)]
        return next((ring[i] for i in order if ready[i]), None)

    def encode(self, prompt: str) -> Future:
        """A prompt's embeddings, as a future: a thread of its own makes them, so that no block waits for them."""

        def run() -> Tensor:
            self._loaded.wait()
            if self._engine is None:
                raise UserError("the server stops")
            with torch.cuda.stream(self._text_stream):  # of None: nothing
                embeds = self._engine.encode(prompt)
            self._engine.forget_prompts(EMBEDDINGS_KEPT)
            return embeds

        return self._text.submit(run)

    # Sessions and jobs

    def create_show(self, overrides: dict | None = None, seed: int | None = None) -> Show:
        """A new session. Raises Refused where there are too many, UserError for bad overrides."""
        config = self._config(overrides, seed)
        self._make_room()
        show = Show(config, self.limits, self.encode, self._record, self.metrics, self._wake.set)
        with self._lock:
            full = len(self._shows) >= self.limits.sessions or self._stopping.is_set()
            if not full:
                self._shows[show.id] = show
        if full:
            show.close("too many")
            raise Refused(429, f"there are {self.limits.sessions} sessions already; end one, or try again later")
        log.info("Session %s begins", show.id[:4])
        return show

    def _make_room(self) -> None:
        """Where there are too many sessions for another, ends the one that nobody has watched for the longest, if it is
        long enough that nobody did."""
        shows = self.shows()
        if len(shows) < self.limits.sessions:
            return
        longest = max(shows, key=Show.idle_for)
        if longest.idle_for() > self.limits.spare_seconds:
            with contextlib.suppress(Refused):  # ended just now
                self.end_show(longest.id, "nobody watched, and another session needs its place")

    def _config(self, overrides: dict | None, seed: int | None) -> Config:
        config = own_config(self.config, overrides or {})
        return config if seed is None else dataclasses.replace(config, seed=seed)

    def _record(self, take: Take) -> Recording:
        return Recording(take, self.storage, self._weights)

    def shows(self) -> list[Show]:
        """All sessions, the oldest first."""
        with self._lock:
            return list(self._shows.values())

    def jobs(self) -> list[JobRun]:
        """All jobs that are not forgotten, the oldest first."""
        with self._lock:
            return list(self._jobs.values())

    def show(self, identity: str) -> Show:
        """Raises Refused where there is no such session."""
        with self._lock:
            found = self._shows.get(identity)
        if found is None:
            raise Refused(404, "no such session; it may have ended")
        return found

    def end_show(self, identity: str, reason: str = "this session was ended") -> None:
        """Raises Refused where there is no such session."""
        show = self.show(identity)
        with self._lock:
            self._shows.pop(identity, None)
        show.close(reason)
        log.info("Session %s ends: %s", show.id[:4], reason)

    def end_idle(self) -> None:
        """Ends the sessions that nobody watches or asks after any more."""
        for show in self.shows():
            show.drop_stalled()
            if show.idle_for() > self.limits.idle_seconds:
                with contextlib.suppress(Refused):  # ended just now
                    self.end_show(show.id, "nobody watched for long")

    def create_job(self, story: Story, frames: int | None, overrides: dict | None = None) -> JobRun:
        """A new job. Raises Refused where too many wait, UserError for a bad story or bad overrides."""
        config = self._config(overrides, None)
        frames = frames_of(config.num_output_frames) if frames is None else frames
        timeline = JobRun.plan(story, config, frames, self.limits)
        with self._lock:
            waiting = sum(job.active for job in self._jobs.values())
            if waiting >= self.limits.jobs or self._stopping.is_set():
                raise Refused(429, f"{waiting} jobs wait already; try again later")
            done = [job.id for job in self._jobs.values() if not job.active]
            for identity in done[: max(0, len(done) - self.limits.jobs_kept + 1)]:
                del self._jobs[identity]
            job = JobRun(story, timeline, config, self.encode,
                         lambda take: Recording(take, self.storage, self._weights, "job", timeline), self.metrics,
                         self._wake.set)
            self._jobs[job.id] = job
        self._wake.set()
        return job

    def job(self, identity: str) -> JobRun:
        """Raises Refused where there is no such job."""
        with self._lock:
            found = self._jobs.get(identity)
        if found is None:
            raise Refused(404, "no such job; it may have been forgotten")
        return found

    def end_job(self, identity: str) -> None:
        """Cancels a job, or forgets one that is done. Raises Refused where there is none."""
        job = self.job(identity)
        with self._lock:
            self._jobs.pop(identity, None)
        if job.active:
            job.cancel()

    # Figures

    def health(self) -> dict:
        """Whether it is loading, ready or failed, and how much memory it takes."""
        status = "failed" if self.failure else "loading" if self.stage else "ready"
        return {"status": status, "stage": self.stage, "message": self.failure,
                "loading_seconds": round(time.monotonic() - self._began, 1) if self.stage else 0.0, **self.memory()}

    def memory(self) -> dict[str, int]:
        """Bytes in use on the GPU (0 without one) and by the process on the host."""
        on_gpu = self._engine is not None and self._engine.device.type == "cuda"
        return {"gpu_bytes": torch.cuda.memory_allocated(self._engine.device) if on_gpu else 0,
                "host_bytes": resident()}

    def _add_gauges(self) -> None:
        def count(status: str) -> Callable[[], int]:
            return lambda: sum(job.status == status for job in list(self._jobs.values()))

        gauge = self.metrics.gauge
        gauge("ready", "1 once the model is loaded.", lambda: not self.stage)
        gauge("sessions", "Live sessions.", lambda: len(self._shows))
        gauge("viewers", "Browsers that watch.", lambda: sum(len(s.viewers) for s in list(self._shows.values())))
        for status in ("queued", "running", "done", "failed"):
            gauge(f"jobs_{status}", f"Jobs that are {status}.", count(status))
        gauge("recordings_bytes", "Bytes of disk that recordings take.", self.storage.used)
        gauge("gpu_memory_bytes", "GPU memory in use.", lambda: self.memory()["gpu_bytes"])
        gauge("host_memory_bytes", "Host memory in use.", lambda: self.memory()["host_bytes"])


def first_blocks(config: Config, device: torch.device) -> list[str]:
    """The prompts of the blocks that are made before any session's: a first one, one after a clean pass, one after a
    re-cache. On a GPU the window is full before that one, as kernels are compiled and memory is taken when they are
    needed for the first time."""
    alike = 2
    if device.type == "cuda" and config.window is not None:
        alike = max(alike, config.window // config.num_frame_per_block + 1)
    return ["a"] * alike + ["b"]
