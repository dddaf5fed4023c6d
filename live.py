"""Video that plays while it is made and follows what you type."""

import sys

from utils.cli import guarded


def main(argv: list[str] | None = None) -> None:
    from live.cli import parse

    task = parse(argv)
    from live.run import run  # after the arguments: torch takes seconds to import

    run(task)


if __name__ == "__main__":
    sys.exit(guarded(main))
