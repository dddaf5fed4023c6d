from pathlib import Path

from utils.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent


def locate(path: str) -> Path | None:
    """A file or folder by a path that is relative to the current folder or, failing that, to this repository."""
    for candidate in (Path(path).expanduser(), REPOSITORY / path):
        if candidate.exists():
            return candidate
    return None


def find_file(path: str, what: str, mend: str = "check the path") -> Path:
    """The existing file at `path`. Raises UserError that says where it was looked for and how to mend it."""
    found = locate(path)
    if found is None:
        places = " and ".join(dict.fromkeys(map(str, (Path.cwd(), REPOSITORY))))
        raise UserError(f"{what}={path}: no such file{'' if Path(path).is_absolute() else f' (looked in {places})'}; "
                        f"{mend}")
    if found.is_dir():
        raise UserError(f"{what}={path} is a folder, not a file; {mend}")
    return found


def read_text(path: Path) -> str:
    """A UTF-8 text file. Raises UserError with the line where it is not UTF-8, or where it can't be read."""
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text (byte 0x{data[error.start]:02x}); "
                        f"save the file as UTF-8") from None
