import datetime
import logging
import re
import secrets
import threading
from collections import defaultdict
from pathlib import Path

log = logging.getLogger(__name__)

OURS = re.compile(r"((?:live|job)-\d{8}-\d{6}-[0-9a-f]{8})(?:\.next)?(?:\.partial)?\.(?:mp4|json)(?:\.part)?")


class Storage:
    """The folder of the recordings, and how much of the disk they take. Touches no file but those that it named."""

    def __init__(self, folder: Path, most_bytes: int):
        self.folder, self.most_bytes = folder, most_bytes
        self._lock = threading.Lock()
        self._busy: set[str] = set()

    def new(self, kind: str) -> Path:
        """A path for a recording that is being made, until `release`."""
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        path = self.folder / f"{kind}-{now}-{secrets.token_hex(4)}.mp4"
        with self._lock:
            self._busy.add(path.stem)
        return path

    def release(self, path: Path) -> None:
        """From now on the recording may go when room is needed."""
        with self._lock:
            self._busy.discard(path.stem)

    def _sets(self) -> dict[str, list[tuple[Path, int, float]]]:
        """The files of each recording, with their sizes and times."""
        sets = defaultdict(list)
        for path in self.folder.glob("*"):
            if match := OURS.fullmatch(path.name):
                try:
                    about = path.stat()
                except OSError:
                    continue  # renamed just now
                sets[match[1]].append((path, about.st_size, about.st_mtime))
        return sets

    def used(self) -> int:
        """Bytes that recordings take."""
        return sum(size for files in self._sets().values() for _, size, _ in files)

    def make_room(self) -> bool:
        """Deletes the oldest recordings until the rest is within the limit. False where those that are being made are
        beyond it alone."""
        with self._lock:
            sets = self._sets()
            total = sum(size for files in sets.values() for _, size, _ in files)
            oldest = sorted(sets, key=lambda stem: max(time for *_, time in sets[stem]))
            for stem in oldest:
                if total <= self.most_bytes:
                    break
                if stem in self._busy:
                    continue
                log.info("Recording %s goes, to stay within %.1f GB", stem, self.most_bytes / 1e9)
                for path, size, _ in sets[stem]:
                    path.unlink(missing_ok=True)
                    total -= size
            return total <= self.most_bytes
