"""Find a checkpoint of the Hugging Face hub: in the local cache, else by a download of what is missing."""

import errno
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import huggingface_hub as hub
from huggingface_hub import constants, errors

from data import say_once
from machine.hardware import first_line
from weights import PROCESSOR, SETTINGS_FILES, WAYS_OUT, WEIGHT_FILES, UnavailableError, list_shards, sha256

TIMEOUT = 5  # seconds, for the one look whether there is a network: the library itself would try half a minute


def fetch(repository: str, revision: str | None = None) -> Path:
    """The directory in the Hugging Face cache that holds a repository's checkpoint; what is missing is downloaded.

    Weights in the cache whose settings are not there get those of the same commit. Without a network they are used as
    they are, and a note says so. Raises FileNotFoundError, or UnavailableError where only the network is missing.
    """

    def look(name: str) -> object:
        """A file's path, None if it is not in the cache, or the hub's note that it does not exist."""
        return hub.try_to_load_from_cache(repository, name, constants.HF_HUB_CACHE, revision)

    def cached(name: str) -> Path | None:
        return Path(found) if isinstance(found := look(name), str) else None

    directory: Path | None = None
    try:
        directory = find_weights(cached, whole=True)
        needed = [name for name in SETTINGS_FILES if name != PROCESSOR or not cached(SETTINGS_FILES[1])]
        if directory and not (needed := [name for name in needed if look(name) is None]):
            return directory
        pinned = directory.name if directory else revision  # a commit's hash is the name of its directory
        with suppress(errors.EntryNotFoundError):
            hub.get_hf_file_metadata(hub.hf_hub_url(repository, needed[0], revision=pinned), timeout=TIMEOUT)
        for name in needed:  # before the weights: a download that is cut off leaves no weights without settings
            get(repository, name, pinned)
        directory = directory or find_weights(lambda name: get(repository, name, pinned), whole=False)
    except Exception as error:
        failure = explain(error, repository, revision)
        if directory is None or failure is error:
            raise failure from None
        lacking = f"lacks {', '.join(needed)}, which could not be fetched: {first_line(error)[:200]}"
        say_once(f"note: {repository}: the Hugging Face cache {lacking}")
    if directory is None:
        raise FileNotFoundError(f"backbone: the hub's {repository} holds none of {', '.join(WEIGHT_FILES)}")
    return directory


def find_weights(find: Callable[[str], Path | None], whole: bool) -> Path | None:
    """The directory of the first weights that `find` finds, with every shard if they must be whole."""
    for name in WEIGHT_FILES:
        if weights := find(name):
            shards = [find(shard) for shard in list_shards(weights) if shard != name]
            if all(shards) or not whole:
                return weights.parent
    return None


def get(repository: str, name: str, revision: str | None) -> Path | None:
    """A file of a repository, downloaded if the cache has it not; None if the hub does not have it."""
    try:
        file = Path(hub.hf_hub_download(repository, name, revision=revision))
    except errors.LocalEntryNotFoundError:  # the network was lost on the way
        raise
    except errors.EntryNotFoundError:
        return None
    check_download(file)
    return file


def explain(error: Exception, repository: str, revision: str | None) -> Exception:
    """The error to raise for one of the hub's, and to say in one line; the same if it is not about the hub."""
    what = f"backbone: {repository} is neither a path here nor"
    if isinstance(error, errors.GatedRepoError):
        advice = f"accept its terms on {constants.ENDPOINT}/{repository}, then log in with `hf auth login`"
        return FileNotFoundError(f"backbone: {repository} is gated: {advice}")
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(f"backbone: {repository} has no revision {revision!r} on the hub")
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        shown = "a repository that the hub shows to you (private ones need `hf auth login`)"
        return FileNotFoundError(f"{what} {shown}; {WAYS_OUT}")
    if isinstance(error, ValueError) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EACCES, errno.EROFS):
        return error
    reason = first_line(error)[:200]
    return UnavailableError(f"{what} in the Hugging Face cache, and cannot be downloaded ({reason}); {WAYS_OUT}")


def check_download(file: Path) -> None:
    """Compare a file in the cache with the SHA-256 that its blob is named after; remove it if it is damaged."""
    blob = file.parent / os.readlink(file) if file.is_symlink() else file  # not `resolve`: a blob may be a link itself
    if re.fullmatch(r"[0-9a-f]{64}", blob.name) and blob.name != sha256([blob]):
        blob.unlink()
        file.unlink()
        raise ValueError(f"{file.name} arrived damaged (its SHA-256 is not {blob.name}); run again to fetch it anew")
