from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one server gives at the most."""

    lead_seconds: float = 0.9  # video that is made before the player needs it
    sessions: int = 4
    viewers: int = 8  # of one session
    session_seconds: float = 7200  # of video
    idle_seconds: float = 900  # a session that nobody watches or asks after ends then
    spare_seconds: float = 60  # or already then, where another is to begin and there are too many
    scheduled: int = 100  # prompts of one session that wait for their time
    jobs: int = 16  # that wait or are being made
    jobs_kept: int = 100  # that are done
    disk_bytes: int = 10 << 30  # recordings; the oldest go first
    prompt_characters: int = 2000
    body_bytes: int = 64 << 10
    message_bytes: int = 32 << 10
    bad_messages: int = 50  # on one connection, then it is closed
