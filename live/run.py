"""live.py after its arguments."""

from live.cli import LiveTask, suggestions
from live.server import listen
from live.server import run as serve
from live.storage import Storage
from live.studio import Studio
from live.terminal import play
from pipeline.engine import Engine
from pipeline.loading import fingerprints
from utils.video import check_writable, find_ffmpeg


def run(task: LiveTask) -> None:
    """Serves the page, or reads the terminal. Raises UserError for whatever the user can mend."""
    find_ffmpeg()
    check_writable(task.folder)
    weights = fingerprints(task.config)
    storage = Storage(task.folder, task.limits.disk_bytes)
    if task.terminal:
        play(task, storage, weights)
        return
    listener = listen(task.access.host, task.port)
    studio = Studio(task.config, task.limits, storage,
                    lambda progress: Engine.from_config(task.config, progress=progress), weights)
    serve(studio, task.access, listener, suggestions(task.config), **({} if task.open_page else {"open_page": None}))
