"""Files on the Hugging Face Hub, by their address hf://OWNER/REPO/FILE."""

import errno
import logging
import re
from pathlib import Path

from engine.options import UserError, utf8_path

PREFIX = "hf://"
ADDRESS = re.compile(r"hf://(?P<repo>[^/@\s]+/[^/@\s]+)/(?P<file>[^@\s]*[^@/\s])"
                     r"(@(?P<revision>[^@\s]+))?")


def file_or_address(text):
    """An argparse type: a path in UTF-8, or an address of the Hub, which stays a str, as a Path
    would make hf:/ of hf://."""
    return text if text.startswith(PREFIX) else utf8_path(text)


def shared_file(name, option, world):
    """local_file on every rank, where rank 0 downloads first and the others of its machine, or of
    its file system, take what it found."""
    path = world.on_main(lambda: local_file(name, option))
    return path if path.exists() or not is_address(name) else local_file(name, option)


def is_address(name):
    return str(name).startswith(PREFIX)


def local_file(name, option):
    """The path of a file: a path as it is, an address hf://OWNER/REPO/FILE[@REVISION] in the cache
    of huggingface_hub, downloaded if it is not there.

    A cached file needs no network and is not looked for again; another REVISION (a branch, a tag, a
    commit; main by default) asks for it. Raises UserError.
    """
    if not is_address(name):
        return Path(name)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import HFValidationError, LocalEntryNotFoundError

    found = ADDRESS.fullmatch(name)
    if not found or ".." in found["file"].split("/"):
        raise _malformed(name, option)
    place = {"repo_id": found["repo"], "filename": found["file"],
             "revision": found["revision"] or "main"}
    log = logging.getLogger("huggingface_hub")
    level = log.level
    try:
        log.setLevel(logging.ERROR)  # it tells each of its attempts
        try:
            return Path(hf_hub_download(**place, local_files_only=True))
        except LocalEntryNotFoundError:
            return Path(hf_hub_download(**place))
    except HFValidationError as error:
        raise _malformed(name, option) from error
    except Exception as error:  # httpx and requests, which older versions use, have their own kinds
        rule, found, remedy = _explain(error)
        found = f" ({found})" if found else ""
        raise UserError(f"{option} must be a file {rule}, got {name}{found}; {remedy}") from error
    finally:
        log.setLevel(level)


def _malformed(name, option):
    return UserError(f"{option} must be a path or hf://OWNER/REPO/FILE, with @REVISION or without, "
                     f"got {name}; write it so")


def _explain(error):
    """(rule, what was found beyond that, remedy) for an error of huggingface_hub."""
    from huggingface_hub import constants
    from huggingface_hub.utils import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    cause, remedy = (("HF_HUB_OFFLINE forbids a download", "unset HF_HUB_OFFLINE")
                     if constants.HF_HUB_OFFLINE else
                     ("could not be downloaded", "connect this machine"))
    copy = "copy the file here and give its path"
    causes = (
        (GatedRepoError, "that you may read, which its owner allows on request", "",
         "ask for access on its page, then run hf auth login"),
        (RepositoryNotFoundError, "of a repository that exists and that you may read", "",
         "check OWNER and REPO, or run hf auth login if it is private"),
        (RevisionNotFoundError, "of a revision that exists", "", "check what follows the @"),
        (LocalEntryNotFoundError, "that is cached or that can be downloaded",
         f"it is not in Hugging Face's cache, and {cause}", f"{remedy}, or {copy}"),
        (EntryNotFoundError, "that its repository holds", "", "check FILE"))
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return ("that can be written to the cache", error.strerror,
                "free space, or name a folder that you may write in HF_HOME")
    return next((found for kind, *found in causes if isinstance(error, kind)),
                ("that can be downloaded", type(error).__name__, f"try again, or {copy}"))
