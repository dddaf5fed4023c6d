"""Download the weights that inference needs from the Hugging Face hub; `--help` says which files, and where they go."""

import argparse
import errno
import json
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import httpx
from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
WAN = "Wan-AI/Wan2.1-T2V-1.3B"
WAN_DIFFUSERS = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
LONGLIVE = "Efficient-Large-Model/LongLive-1.3B"

EPILOG = f"""\
what is fetched (about 20 GB with the default options):
  {WAN}
      config.json, the UMT5 text encoder, its tokenizer and the VAE. Not its generator: longlive_base.pt holds
      a whole one. --with-base-generator adds it (5.7 GB), for running the plain base model.
  {LONGLIVE}
      models/longlive_base.pt, models/lora.pt and, if there are any, prompts/*.

examples:
  python scripts/download.py --dry-run             what would be fetched, with sizes
  python scripts/download.py                       fetch it
  python scripts/download.py --diffusers           the base in Diffusers' layout in place of the native one
  python scripts/download.py --wan-folder /data/wan --longlive-folder /data/longlive
  python scripts/download.py --revision longlive=<commit>

Interrupted? Run the same command again: finished files stay, and a large file goes on in the middle, where it stopped.
Large files are checked against the hub's SHA-256. The repositories are public; should the hub ask for a token, set
HF_TOKEN or run `hf auth login`. HF_ENDPOINT=https://... takes everything from a mirror of the hub.
"""


@dataclass(frozen=True)
class Source:
    """A hub repository, which of its files are wanted (glob patterns) and the folder that they go to."""

    repo: str
    revision: str
    folder: Path
    folder_option: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


@dataclass(frozen=True)
class RemoteFile:
    """One wanted file: its path in the repository, its size in bytes and, for large files, its SHA-256."""

    source: Source
    commit: str
    path: str
    size: int
    sha256: str | None

    @property
    def target(self) -> Path:
        return self.source.folder / self.path

    @property
    def part(self) -> Path:
        """Where a large file grows. The name holds the hash, so that two versions of a file never mix."""
        return self.target.with_name(f"{self.target.name}.{(self.sha256 or '')[:12]}.part")

    @property
    def complete(self) -> bool:
        return self.target.is_file() and self.target.stat().st_size == self.size

    @property
    def missing(self) -> int:
        """Bytes still to be fetched."""
        if self.complete:
            return 0
        return max(0, self.size - (file_size(self.part) if self.sha256 else 0))


def file_size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def format_size(num_bytes: int) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes} B"


def list_files(source: Source) -> list[RemoteFile]:
    """The wanted files of `source` as the hub lists them. Raises UserError if a required one is not there."""
    with explaining(source):
        info = HfApi().model_info(
            source.repo, revision=source.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    paths = [sibling.rfilename for sibling in info.siblings]
    for pattern in source.required:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise UserError(
                f"{source.repo} at revision {source.revision} has no file {pattern} (404); "
                f"see {constants.ENDPOINT}/{source.repo}/tree/{source.revision} and choose another --revision"
            )
    files = []
    for sibling in info.siblings:
        path = sibling.rfilename
        if not any(fnmatchcase(path, pattern) for pattern in source.required + source.optional):
            continue
        if ".." in PurePosixPath(path).parts:
            raise UserError(f"{source.repo} lists {path!r}, which leads out of {source.folder}; nothing was fetched")
        files.append(RemoteFile(source, info.sha, path, sibling.size, sibling.lfs.sha256 if sibling.lfs else None))
    return sorted(files, key=lambda file: file.path)


def print_plan(files: list[RemoteFile]) -> None:
    width = max(len(file.path) for file in files)
    previous = None
    for file in files:
        if file.source is not previous:
            previous = file.source
            print(f"{file.source.repo} @ {file.source.revision} ({file.commit[:12]}) -> {file.source.folder}")
        on_disk = file.size - file.missing
        state = "complete" if file.complete else f"{format_size(on_disk)} on disk" if on_disk else ""
        print(f"  {file.path:<{width}}  {format_size(file.size):>10}  {state}".rstrip())
    total, missing = sum(file.size for file in files), sum(file.missing for file in files)
    complete = sum(file.complete for file in files)
    print(
        f"total {format_size(total)} in {len(files)} files; {complete} complete, {format_size(missing)} to download",
        flush=True,
    )


def check_space(files: list[RemoteFile]) -> None:
    """Raise UserError if a disk has less room than the files that go to it still need."""
    needed: dict[int, int] = defaultdict(int)
    folders: dict[int, Path] = {}
    for file in files:
        existing = next(path for path in (file.source.folder, *file.source.folder.parents) if path.exists())
        device = existing.stat().st_dev
        needed[device] += file.missing
        folders[device] = existing
    for device, folder in folders.items():
        free = shutil.disk_usage(folder).free
        if needed[device] > free:
            raise UserError(
                f"not enough disk space at {folder}: {format_size(needed[device])} needed, {format_size(free)} free; "
                f"free {format_size(needed[device] - free)} or name other folders with --wan-folder, --longlive-folder"
            )


def make_folder(source: Source) -> None:
    with explaining(source):
        source.folder.mkdir(parents=True, exist_ok=True)
        if not os.access(source.folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def fetch(file: RemoteFile) -> None:
    """Bring one file to its place and have huggingface_hub verify and record it."""
    with explaining(file.source):
        if file.sha256 and not file.complete:
            print(f"fetching {file.path}, {format_size(file.missing)}", flush=True)
            fetch_resumable(file)
            print(f"checking {file.path}", flush=True)
        hf_hub_download(file.source.repo, file.path, revision=file.commit, local_dir=file.source.folder)
    if not file.complete:
        raise UserError(
            f"{file.target} has {file_size(file.target)} bytes, the hub says {file.size}; delete it and run again"
        )


def fetch_resumable(file: RemoteFile) -> None:
    """Fetch a large file, going on from the bytes that an earlier run left.

    hf_hub_download throws a partial file away and starts from zero. http_get below it can go on from an offset, so it
    is called directly; it is not part of the documented interface of the pinned huggingface_hub. A redirect to a
    storage host goes without the token, as httpx drops it there.
    """
    url = hf_hub_url(file.source.repo, file.path, revision=file.commit)
    file.part.parent.mkdir(parents=True, exist_ok=True)
    if file_size(file.part) > file.size:  # two runs at once wrote to it
        file.part.unlink()
    while (start := file_size(file.part)) < file.size:
        try:
            with file.part.open("ab") as out:
                http_get(
                    url,
                    out,
                    resume_size=start,
                    headers=build_hf_headers(),
                    expected_size=file.size,
                    displayed_filename=file.path,
                )
        except httpx.NetworkError:
            if file_size(file.part) <= start:
                raise
    file.part.replace(file.target)


@contextmanager
def explaining(source: Source) -> Iterator[None]:
    """Turn what the hub, the network or the disk may raise into a UserError."""
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL, OSError, json.JSONDecodeError) as error:
        if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
            error = error.__cause__
        raise UserError(" ".join(explain(error, source).split())) from error


def explain(error: Exception, source: Source) -> str:
    """What went wrong and how to mend it."""
    endpoint = constants.ENDPOINT
    if isinstance(error, HfHubHTTPError):
        return explain_answer(error, source)
    if isinstance(error, OfflineModeIsEnabled):
        return f"cannot fetch {source.repo}: offline mode is on; unset HF_HUB_OFFLINE and run again"
    if isinstance(error, (httpx.HTTPError, httpx.InvalidURL)):
        return (
            f"cannot reach the hub at {endpoint} ({type(error).__name__}: {error}); check the network and run again, "
            "which resumes; HF_ENDPOINT=https://... can name a mirror"
        )
    if isinstance(error, json.JSONDecodeError):
        return f"{endpoint} does not answer like a Hugging Face hub; check HF_ENDPOINT, the proxy and any login page"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"disk full while writing to {source.folder}; free some space and run again, which resumes"
    if isinstance(error, OSError) and error.errno is not None:
        return (
            f"cannot write to {source.folder}: {error.strerror}; "
            f"make it writable or name another folder with {source.folder_option}"
        )
    return f"cannot fetch {source.repo}: {error}"


def explain_answer(error: HfHubHTTPError, source: Source) -> str:
    """The same for an error status that the hub answered with."""
    status = error.response.status_code
    page = f"{constants.ENDPOINT}/{source.repo}"
    login = "set HF_TOKEN or run `hf auth login` (tokens are made at https://huggingface.co/settings/tokens)"
    if isinstance(error, GatedRepoError):
        first = f"{login}, then " if status == 401 else ""
        return f"{source.repo} is gated ({status}): {first}open {page}, accept its licence and run again"
    if status == 401:
        return f"the hub refuses access to {source.repo} (401): no token, or a wrong or expired one; {login}"
    if status == 403:
        return (
            f"the hub forbids access to {source.repo} (403): open {page} with the account of your token and accept its "
            "licence if it asks; a fine-grained token must be allowed to read it"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{source.repo} has no revision {source.revision} (404); see {page}/commits/main"
    if status == 404:
        return f"not found (404): {error.response.url.path} at {constants.ENDPOINT}; check --revision and HF_ENDPOINT"
    if status == 429:
        return f"the hub limits the rate of requests (429); wait some minutes and run again, which resumes, or {login}"
    return f"the hub at {constants.ENDPOINT} answers {status} for {source.repo}; try again later, which resumes"


def parse_revisions(values: list[str]) -> dict[str, str]:
    """`["v1", "wan=abc"]` -> `{"wan": "abc", "longlive": "v1"}`; `main` where nothing is said."""
    revisions = {"wan": "main", "longlive": "main"}
    for value in values:
        name, _, revision = value.partition("=")
        revisions |= {name: revision} if name in revisions else dict.fromkeys(revisions, value)
    return revisions


def choose_sources(args: argparse.Namespace) -> list[Source]:
    revisions = parse_revisions(args.revision)
    if args.diffusers:
        repo = WAN_DIFFUSERS
        generator = "transformer/*" if args.with_base_generator else "transformer/config.json"
        required = ("model_index.json", "text_encoder/*", "tokenizer/*", "vae/*", generator)
    else:
        repo = WAN
        generator = ("diffusion_pytorch_model.safetensors",) if args.with_base_generator else ()
        required = (
            "config.json",
            "models_t5_umt5-xxl-enc-bf16.pth",
            "google/umt5-xxl/*",
            "Wan2.1_VAE.pth",
            *generator,
        )
    wan_folder = args.wan_folder or ROOT / "wan_models" / repo.split("/")[1]
    return [
        Source(repo, revisions["wan"], wan_folder.expanduser().absolute(), "--wan-folder", required),
        Source(
            LONGLIVE,
            revisions["longlive"],
            args.longlive_folder.expanduser().absolute(),
            "--longlive-folder",
            required=("models/longlive_base.pt", "models/lora.pt"),
            optional=("prompts/*",),
        ),
    ]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split(";")[0] + ".",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dry-run", action="store_true", help="print the list of files and stop")
    parser.add_argument("--diffusers", action="store_true", help=f"take the base from {WAN_DIFFUSERS}")
    parser.add_argument("--with-base-generator", action="store_true", help="fetch the base's own generator too")
    parser.add_argument(
        "--wan-folder", type=Path, metavar="DIR", help="folder of the base (default: wan_models/<name> in this repo)"
    )
    parser.add_argument(
        "--longlive-folder",
        type=Path,
        metavar="DIR",
        default=ROOT / "longlive_models",
        help="folder that gets models/ and prompts/ (default: longlive_models in this repo)",
    )
    parser.add_argument(
        "--revision",
        action="append",
        default=[],
        metavar="[wan=|longlive=]REV",
        help="branch, tag or commit, of both repositories or of the named one (default: main); may be repeated",
    )
    return parser.parse_args(argv)


def download(args: argparse.Namespace) -> None:
    sources = choose_sources(args)
    files = [file for source in sources for file in list_files(source)]
    print_plan(files)
    if args.dry_run:
        return
    check_space(files)
    for source in sources:
        make_folder(source)
    for file in files:
        fetch(file)
    print(f"all {len(files)} files are in place")


def main(argv: list[str] | None = None) -> int:
    try:
        download(parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        return 130
    except OSError as error:  # an unreadable folder on the way to the files; the text names it
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
