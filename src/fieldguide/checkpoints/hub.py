"""Downloads of the models that the user names, from the Hugging Face Hub into the cache shared through huggingface_hub.

huggingface_hub transfers and caches the files. This module chooses those that a model needs, verifies their SHA-256
digests, reports progress in lines, and uses a complete earlier download if the hub is unreachable.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fieldguide.checkpoints.names import PIPELINE_FILE
from fieldguide.checkpoints.pipeline_parts import choose_pipeline_files, has_all_parts
from fieldguide.checkpoints.shard_index import read_shard_names
from fieldguide.core.errors import WeightsError
from fieldguide.core.terminal import echo

if TYPE_CHECKING:
    from huggingface_hub.utils import tqdm

LOG_INTERVAL_S = 5  # between two lines on the progress of a file
LIST_TIMEOUT_S = 30  # for the list of a model's files
BUSY = (408, 429, 500, 502, 503, 504)  # statuses that say nothing about the model
WEIGHTS = (".safetensors", ".bin")
PATTERNS = (
    "*.safetensors *.safetensors.index.json config.json generation_config.json preprocessor_config.json processor_config.json "
    "tokenizer* vocab* merges.txt spiece.model spm.model sentencepiece* added_tokens.json special_tokens_map.json chat_template* "
    "adapter_config.json adapter_model.* modules.json config_sentence_transformers.json sentence_bert_config.json"
).split()
# Modules of sentence-transformers, in a folder each.
MODULE_PATTERNS = ["?_Pooling/config.json", "?_Dense/config.json", "?_Dense/model.safetensors", "?_LayerNorm/*"]
ADAPTER = "adapter_model.safetensors"
PICKLE_PATTERNS = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]  # only if there are no safetensors


class UnreachableError(WeightsError):
    """The hub cannot be reached, and the model was not downloaded before."""


def print_stderr(text: str) -> None:
    """Print a line to stderr."""
    echo(text, file=sys.stderr)


def split_name(name: str) -> tuple[str, str, str]:
    """Return repository, revision and file of organization/name or organization/name/file, with or without @revision at the end."""
    path, _, revision = name.partition("@")
    organization, _, rest = path.partition("/")
    model, _, file = rest.partition("/")
    return f"{organization}/{model}" if rest else organization, revision or "main", file


def download_model(name: str, log: Callable[[str], None] = print_stderr) -> Path:
    """Return the folder of `organization/name` or `organization/name@revision`, with missing files downloaded; of
    `organization/name/file` the file, which is downloaded alone.

    `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` have their usual meaning. Raises `WeightsError`
    for a model that does not exist or is not accessible, an unreachable hub, and an interrupted or damaged download.
    """
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import validate_repo_id

    repository, revision, single = split_name(name)
    try:
        validate_repo_id(repository if "/" in repository else "")
    except HFValidationError:
        raise WeightsError(
            f"hf:{name} is no model name: use hf:organization/name, hf:organization/name@revision or hf:organization/name/file"
        ) from None
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    where: dict[str, Any] = {"repo_id": repository, "cache_dir": cache_folder()}
    try:
        if is_offline():
            raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
        api = HfApi(endpoint=endpoint)
        info = api.model_info(repository, revision=revision, files_metadata=True, timeout=LIST_TIMEOUT_S)
    except (OSError, HTTPError, ValueError) as error:  # ValueError: the answer is not JSON but, say, a login page
        if reason := describe_refusal(error):
            raise WeightsError(f"hf:{name}: {reason}") from error
        problem = f"hf:{name}: {endpoint} cannot be reached ({first_line(error)})."
        if folder := find_download(revision, where, single):
            log(f"{problem}\nUsing the files downloaded before, in {folder}")
            return folder
        raise UnreachableError(f"{problem} If the files are on this machine already, pass their folder.") from error
    files, commit = {file.rfilename: file for file in info.siblings or []}, info.sha or revision
    # Weights last: `find_download` relies on it that a folder with all weights is complete.
    chosen = sorted(choose_files(files), key=lambda path: (path.endswith(WEIGHTS), path))
    if single:
        if single not in files:
            raise WeightsError(f"hf:{repository} has no file {single!r}; it has: {', '.join(sorted(files)[:20])}")
        chosen = [single]
    elif not any(path.endswith(WEIGHTS) for path in chosen):
        raise WeightsError(
            f"hf:{name} holds no weights in safetensors or of torch.save under a usual name; it has: "
            f"{', '.join(sorted(files)[:20])}. Name one of them as hf:{repository}/FILE if it holds weights."
        )

    def download(path: str, revision: str) -> Path:
        try:
            bar = progress_class(path, log)
            return Path(hf_hub_download(filename=path, revision=revision, endpoint=endpoint, tqdm_class=bar, **where))
        except Exception as error:  # of the network, the disk, or whatever transfers the files
            reason = describe_refusal(error) or (
                f"the download of {path} was interrupted ({first_line(error)}). Run again: complete files are kept."
            )
            raise WeightsError(f"hf:{name}: {reason}") from error

    for path in chosen:
        if not isinstance(try_to_load_from_cache(filename=path, revision=commit, **where), str):
            log(f"{path}: {(files[path].size or 0) / 1e6:,.1f} MB")
            file = download(path, commit)
            if lfs := files[path].lfs:
                verify(file, lfs.sha256, f"hf:{name}: {path}")
    download(chosen[0], revision)  # stores which commit the revision is, for use without a network
    first = download(chosen[0], commit)
    return first if single else first.parents[chosen[0].count("/")]


def is_offline() -> bool:
    """Return whether the user forbids contact with the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def is_downloaded(name: str) -> bool:
    """Return whether all files of `organization/name`, or a file of it, are in the cache, without importing huggingface_hub.

    The layout of its cache is public: refs/main holds the commit, and snapshots/COMMIT the files.
    """
    try:
        repository, _, single = split_name(name)
        folder = cache_folder() / f"models--{repository.replace('/', '--')}"
        snapshot = folder / "snapshots" / (folder / "refs/main").read_text(encoding="utf-8").strip()
        return (snapshot / single).is_file() if single else has_all_weights(snapshot)
    except (OSError, WeightsError, ValueError):  # nothing there, or damaged: downloading repairs it
        return False


def find_model(name: str) -> Path:
    """Return the folder or file of a model that was downloaded before, without contacting the hub.

    For names that files contain: only the user decides what is downloaded, and to whom the token is sent. Raises `WeightsError`
    if the model is not in the cache.
    """
    repository, revision, single = split_name(name)
    try:
        folder = find_download(revision, {"repo_id": repository, "cache_dir": cache_folder()}, single)
    except ValueError:
        folder = None
    if folder is None:
        raise WeightsError(
            f"hf:{name} is not among the downloads on this machine, and names in files are not downloaded. If you trust it, load it "
            f"once by its name: `fieldguide predict hf:{name} INPUT`, `fit --weights hf:{name}`, or fieldguide.load('hf:{name}')."
        )
    return folder


def choose_files(paths: Iterable[str]) -> set[str]:
    """Return the files to download: configuration, tokenizer and weights, as safetensors if there are any."""

    def matching(patterns: list[str]) -> set[str]:
        return {path for path in paths if any(fnmatch(path, p) and path.count("/") == p.count("/") for p in patterns)}

    paths = list(paths)
    if PIPELINE_FILE in paths:
        return choose_pipeline_files(paths)
    found = matching([*PATTERNS, *(MODULE_PATTERNS if "modules.json" in paths else [])])
    if "model.safetensors" in found:  # some repositories hold the same weights in other forms as well
        same = {path for path in found if path.endswith(".safetensors") and "/" not in path}
        found -= same - {"model.safetensors", ADAPTER}
    has_weights = any(path.endswith(".safetensors") and "/" not in path for path in found)
    return found if has_weights else found | matching(PICKLE_PATTERNS)


def cache_folder() -> Path:
    """Return the cache of huggingface_hub, which itself reads the environment only once, at its import."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or Path(home) / "hub"
    try:
        return Path(os.path.expandvars(cache)).expanduser()
    except RuntimeError:
        raise WeightsError(
            "downloads are stored in the home directory, and none is known: HOME is not set. Set HOME, or HF_HOME to a folder "
            "that can be written."
        ) from None


def find_download(revision: str, where: dict[str, Any], single: str = "") -> Path | None:
    """Return the folder of a revision in the cache if it has all of its weights, or the `single` file of it."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(revision=revision, local_files_only=True, allow_patterns=["config.json"], **where))
    except OSError:
        return None
    if single:
        return folder / single if (folder / single).is_file() else None
    return folder if has_all_weights(folder) else None


def has_all_weights(folder: Path) -> bool:
    """Return whether a folder of the cache has all files of its weights."""
    if (folder / PIPELINE_FILE).is_file():
        return has_all_parts(folder)
    names = choose_files([path.name for path in folder.iterdir()])
    needed = {name for name in names if name.endswith(WEIGHTS)}
    if "model.safetensors" not in names:
        for name in (name for name in names if name.endswith(".index.json")):
            needed |= set(read_shard_names(folder / name))
    return bool(needed) and needed <= names


def verify(path: Path, sha256: str, place: str) -> None:
    """Raise `WeightsError` and remove a file from the cache if its digest differs from the one that the hub states."""
    digest = None
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    finally:
        if digest != sha256:  # also if the user interrupts, because files in the cache are not verified again
            path.resolve().unlink()
            path.unlink(missing_ok=True)
    if digest != sha256:
        raise WeightsError(
            f"{place} does not match the digest of the hub and was discarded. Run again; if it fails again, "
            "something between this machine and the hub alters files."
        )


def describe_refusal(error: Exception) -> str | None:
    """Return why the hub refuses a request, or None if it could not be reached."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    error = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
    if not isinstance(error, HfHubHTTPError) or error.response.status_code in BUSY:
        return None
    if isinstance(error, GatedRepoError):
        return "access is gated. Accept the terms on the page of the model, then set HF_TOKEN or run `hf auth login`."
    if isinstance(error, RevisionNotFoundError):
        return "this revision does not exist."
    if isinstance(error, RepositoryNotFoundError):
        return "this model does not exist, or it is private. For a private model set HF_TOKEN or run `hf auth login`."
    return f"the hub refuses the request ({first_line(error)})."


def first_line(error: Exception) -> str:
    """Return the first line of an error's text."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def progress_class(path: str, log: Callable[[str], None]) -> type[tqdm]:
    """Return a class of progress bars that write lines to `log`, for long downloads only."""
    from huggingface_hub.utils import tqdm

    class Progress(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            pace = {"mininterval": LOG_INTERVAL_S, "miniters": 1}
            super().__init__(*args, **kwargs | pace | {"file": io.StringIO(), "leave": False, "disable": False})

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            if msg is None and self.total and self.n > self.initial:
                left = (self.total - self.n) * self.format_dict["elapsed"] / (self.n - self.initial)
                log(f"{path}: {self.n / 1e6:,.1f} of {self.total / 1e6:,.1f} MB; about {left:,.0f} s left")

        def update_transfer(self, *_: Any) -> None:
            """Ignore bytes received but not yet written; without this method they have a second bar."""

        set_transfer_postfix_str = update_transfer

    return Progress
