"""Checkpoints by path, or by address on the Hugging Face Hub: hf://OWNER/REPO[@REVISION]/FILE."""

import argparse
import logging
import re
import shlex
import sys
import urllib.parse
import warnings
from pathlib import Path

from engine.checkpoint import load_checkpoint
from engine.errors import BadValue, UserError, one_line
from engine.files import sha256

NAME, REVISION = r"(?!\.\.?[/@])[^/@\s]+", r"refs/\w+/\w+|(?!\.\.?/)[^/@\s]+"  # neither . nor ..
ADDRESS = re.compile(rf"hf://(?P<repo_id>{NAME}/{NAME})(@(?P<revision>{REVISION}))?"
                     r"/(?P<filename>(?!(.*/)?\.\.?(/|$))[^@]*[^@/\s])")
# What a browser shows, or that after hf://
PAGE = re.compile(r"(hf://|(https?://)?(www\.)?(huggingface\.co|hf\.co|hf-mirror\.com)/)"
                  r"(?P<repository>[^/]+/[^/?#]+)(/(blob|resolve|raw|tree|blame)"
                  r"/(?P<revision>refs/\w+/\w+|[^/?#]+)(/(?P<file>[^?#]+))?)?/?([?#].*)?")


def file_or_address(text):
    """An argparse type: a path, or an address, which stays a str: a Path would make hf:/ of it."""
    return text if "://" in text else Path(text)


def repository(text):
    """An argparse type: OWNER/REPO."""
    if not re.fullmatch(f"{NAME}/{NAME}", text):
        raise argparse.ArgumentTypeError(f"must be OWNER/REPO, got {text}; name a repository")
    return text


def identifier(text):
    """An argparse type: a licence as the Hub calls it."""
    if not re.fullmatch(r"[\w.+-]+", text):
        raise argparse.ArgumentTypeError(f"must be letters, digits, . + and -, got {text!r}; name "
                                         f"a licence as the Hub does")
    return text


def open_checkpoint(name, world):
    """The checkpoint of this path or address, as load_checkpoint returns it. Every rank must call
    this: rank 0 verifies the file, and each machine downloads it. Raises BadValue."""
    def verify(path):
        load_checkpoint(path, verify=True)
        return path

    path = world.on_main(lambda: read_file(name, verify))
    return load_checkpoint(path if path.exists() else local_file(name))


def read_file(name, read):
    """read(path) for the file of this path or address. Where read raises BadValue, a file of the
    cache that is not the Hub's is downloaded again, once. Raises BadValue."""
    path = local_file(name)
    try:
        return read(path)
    except BadValue:
        blob = path.resolve()  # the cache names all but small files by their SHA-256
        if path == Path(name) or blob.name == sha256(blob):
            raise
        print(f"{blob} seems torn or damaged", file=sys.stderr)
    path = local_file(name, again=True)
    try:
        return read(path)
    except BadValue as error:
        raise BadValue(f"{error} ({name}, downloaded again to {path.resolve()})") from error


def local_file(name, *, again=False):
    """The path of a file; of an address, in the cache of huggingface_hub, downloaded if it is not
    there, or again. REVISION is a branch, a tag or a commit, by default main. Raises BadValue."""
    text = str(name)
    place, is_page = ADDRESS.fullmatch(text), PAGE.fullmatch(text) and not Path(name).exists()
    if not place and ("://" in text or is_page):
        remedy = "mend it" if text.startswith("hf://") else "download it and give its path"
        raise BadValue(f"must be a path or hf://OWNER/REPO[@REVISION]/FILE, got {name}; "
                       f"{suggestion(text) or remedy}")
    if not place:
        return Path(name)
    from huggingface_hub.utils import LocalEntryNotFoundError

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells each of its attempts
    try:
        return download(place.groupdict(), name, again)
    except Exception as error:  # httpx and requests, which older versions use, have their own kinds
        cause = isinstance(error, LocalEntryNotFoundError) and error.__cause__ or error
        remedy = "check the address, the network and HF_HOME, or give the path of a copy"
        raise BadValue(f"must be cached or downloadable, got {name} ({one_line(cause)}); "
                       f"{suggestion(text) or remedy}") from error


def download(place, name, again):
    """The path of a file in the cache, to which it is downloaded. Raises errors of many kinds."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import LocalEntryNotFoundError

    try:
        if not again:
            return Path(hf_hub_download(**place, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    print(f"downloading {name}", file=sys.stderr)  # without a network the client tries for a while
    with warnings.catch_warnings():  # of a full disk: the error says it
        warnings.simplefilter("ignore")
        return Path(hf_hub_download(**place, **({"force_download": True} if again else {})))


def push_folder(folder, repository):
    """Upload a folder to OWNER/REPO on the Hub, which is made if it is missing. Raises UserError.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repository, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:  # as in local_file
        raise UserError(f"--push must be a repository that you may write, got {repository} "
                        f"({one_line(error)}); {folder} is whole: hf auth login, then hf upload "
                        f"{repository} {shlex.quote(str(folder))}") from error


def suggestion(text):
    """"give hf://..." for the address of a page of the Hub, else ""."""
    page = PAGE.fullmatch(text)
    if not page:
        return ""
    parts = {name: urllib.parse.unquote(part or "") for name, part in page.groupdict().items()}
    revision = f"@{parts['revision']}" if parts["revision"] not in ("", "main") else ""
    return f"give hf://{parts['repository']}{revision}/{parts['file'] or 'FILE'}"
