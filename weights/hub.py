"""Checkpoints by path, or by address on the Hugging Face Hub: hf://OWNER/REPO[@REVISION]/FILE."""

import contextlib
import logging
import re
import sys
from pathlib import Path
from urllib.parse import unquote

from engine.checkpoint import load_checkpoint
from engine.errors import BadValue
from engine.files import sha256

ADDRESS = re.compile(r"(?!.*[/@]\.{1,2}(/|$))"  # no . and .., which leave the cache
                     r"hf://(?P<repo_id>[^/@\s]+/[^/@\s]+)"
                     r"(@(?P<revision>refs/\w+/\w+|[^/@\s]+))?/(?P<filename>[^@]*[^@/\s])")
IN_BROWSER = re.compile(r"(?:hf://|(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/)([^/]+/[^/]+)"
                        r"/(?:blob|resolve|raw|tree)/([^/]+)/([^?#]+)")


def file_or_address(text):
    """An argparse type: a path, or an address, which stays a str: a Path would make hf:/ of it."""
    return text if "://" in text else Path(text)


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
    there or damaged. REVISION is a branch, a tag or a commit, by default main. Raises BadValue."""
    page = IN_BROWSER.match(str(name))
    if "://" not in str(name) and (Path(name).exists() or not page):
        return Path(name)
    place, remedy = ADDRESS.fullmatch(str(name)), "mend it"
    if page:
        repository, revision, file = map(unquote, page.groups())
        remedy = f"give hf://{repository}{'' if revision == 'main' else f'@{revision}'}/{file}"
    if not place:
        raise BadValue(f"must be a path or hf://OWNER/REPO[@REVISION]/FILE, got {name}; {remedy}")
    try:
        return _download(name, place.groupdict())
    except Exception as error:  # httpx and requests, which older versions use, have their own kinds
        while error.__cause__:
            error = error.__cause__
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        remedy = remedy if page else "check the address or give the path of a copy"
        raise BadValue(f"must be cached or downloadable, got {name} ({reason:.200}); "
                       f"{remedy}") from error


def _download(name, place):
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import LocalEntryNotFoundError

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells each of its attempts
    with contextlib.suppress(LocalEntryNotFoundError):
        path = Path(hf_hub_download(**place, local_files_only=True))
        blob = path.resolve()  # large ones are named by their SHA-256
        if not re.fullmatch("[0-9a-f]{64}", blob.name) or sha256(blob) == blob.name:
            return path
        print(f"{blob} is damaged", file=sys.stderr)
        place = place | {"force_download": True}
    print(f"downloading {name}", file=sys.stderr)
    return Path(hf_hub_download(**place))
