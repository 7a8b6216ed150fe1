"""Checkpoints by path, or by address on the Hugging Face Hub: hf://OWNER/REPO[@REVISION]/FILE."""

import contextlib
import logging
import re
from pathlib import Path

from engine.checkpoint import load_checkpoint
from engine.errors import BadValue

PREFIX = "hf://"
ADDRESS = re.compile(r"hf://(?P<repo_id>[^/@\s]+/[^/@\s]+)(@(?P<revision>refs/\w+/\w+|[^/@\s]+))?"
                     r"/(?P<filename>[^@\s]*[^@/\s])")


def file_or_address(text):
    """An argparse type: a path, or an address, which stays a str: a Path would make hf:/ of it."""
    return text if text.startswith(PREFIX) else Path(text)


def open_checkpoint(name, world):
    """The checkpoint of this path or address, as load_checkpoint returns it. Every rank must call
    this: rank 0 verifies the file, and each machine downloads it. Raises BadValue."""
    def find():
        path = local_file(name)
        load_checkpoint(path, verify=True)
        return path

    path = world.on_main(find)
    return load_checkpoint(path if path.exists() else local_file(name))


def local_file(name):
    """The path of a file; of an address, in the cache of huggingface_hub, downloaded if it is not
    there. REVISION is a branch, a tag or a commit, by default main. Raises BadValue."""
    if not str(name).startswith(PREFIX):
        return Path(name)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import LocalEntryNotFoundError

    place = ADDRESS.fullmatch(name)
    if not place:
        raise BadValue(f"must be a path or hf://OWNER/REPO[@REVISION]/FILE, got {name}; mend it")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells each of its attempts
    try:
        with contextlib.suppress(LocalEntryNotFoundError):
            return Path(hf_hub_download(**place.groupdict(), local_files_only=True))
        return Path(hf_hub_download(**place.groupdict()))
    except Exception as error:  # httpx and requests, which older versions use, have their own kinds
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise BadValue(f"must be cached or downloadable, got {name} ({reason:.200}); check the "
                       f"address or give the path of a copy") from error
