"""Publishing a run on the Hub: everything in one commit, or nothing."""

from __future__ import annotations

import logging
import re
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils._validators import validate_repo_id

from fliqs_hf.errors import ConfigError, HubError
from fliqs_hf.hf.card import check_names, model_card
from fliqs_hf.hf.publication import OWN_FILES, publication
from fliqs_hf.runs.finished import FinishedRun

logger = logging.getLogger(__name__)

ATTEMPTS = 3
FIRST_PAUSE_S = 1.0

#: Any failure of the connection, in whichever HTTP library this version of huggingface_hub uses.
_TransportError: type[BaseException] = HfHubHTTPError.__mro__[1]
_REMEDIES = {
    401: "the access token is missing or not valid; run `hf auth login`, set HF_TOKEN, or pass token=…",
    403: "the access token may not write there; use one with write permission for it, or create_pr=True",
    404: "there is no such repository, branch or namespace, or the access token may not see it; check the name",
    409: "the repository is being changed by somebody else; push again",
    412: "the repository is being changed by somebody else; push again",
    429: "too many requests; wait some minutes and push again",
}
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    base_model: str | None = None,
    license: str | None = None,
    card: ModelCard | None = None,
) -> str:
    """Publish a run folder, or a model alone, as it is: packed weights, config, image processor, allocation, search
    history, figures, report and model card.

    The repository is made if it does not exist. Large files go up first, unseen; one commit then shows all files at
    once and removes weights, figures and records of an earlier push that the new model does not have. Whoever loads
    the model meanwhile gets the old one or the new one, complete. README.md is replaced, files that are not ours stay.
    A dropped connection is tried again, and what has arrived is not sent twice. Without changes there is no commit.

    Args:
        folder: see `FinishedRun`.
        repo_id: "namespace/name", or "name" in your own namespace.
        private: of a new repository. Default: as your account says. True refuses an existing public one.
        token: default: HF_TOKEN, or that of `hf auth login`.
        revision: branch to commit to, made from main if it does not exist. Default: main.
        create_pr: propose the commit as a pull request instead.
        base_model, license: see `model_card`.
        card: instead of `model_card(folder, repo_id, …)`; it is published as it is.
    Returns: URL of the commit, or of the pull request.
    Raises:
        ConfigError: a base model or licence that cannot be one.
        CheckpointError: the checkpoint is incomplete or not packed; nothing was sent.
        HubError: the Hub refuses, cannot be reached, or a file holds an access token.
    """
    if card is not None and (base_model or license):
        raise ConfigError("base_model and license are for the card that is made here; write them into yours")
    check_names(None, base_model, license)
    run = FinishedRun.read(folder)
    api = HfApi(token=token)
    repo_id = _full_name(api, repo_id, token)
    files = publication(run)
    files["README.md"] = str(card or model_card(folder, repo_id, base_model=base_model, license=license)).encode()
    _refuse_secrets(files, token)

    _ask(api, repo_id, api.create_repo, repo_id, private=private, exist_ok=True)
    if revision is not None and not create_pr and not revision.startswith("refs/pr/"):
        _ask(api, repo_id, api.create_branch, repo_id, branch=revision, exist_ok=True)
    commit = _ask(
        api, repo_id, _commit, api, repo_id, files, private=private, revision=revision, create_pr=create_pr,
        commit_message=commit_message or "Upload a model quantized with fliqs_hf",
        # A request that broke off may have been carried out: a second commit would find nothing left to do, but a
        # second pull request would be one too many.
        attempts=1 if create_pr else ATTEMPTS,
    )  # fmt: skip
    return str(commit.pr_url or commit.commit_url)


def make_repository(repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Make the repository that `push` will fill, if it does not exist: what is wrong with name or token shows now.

    Returns: its name with the namespace. Raises: HubError: as `push`.
    """
    api = HfApi(token=token)
    repo_id = _full_name(api, repo_id, token)
    _ask(api, repo_id, api.create_repo, repo_id, private=private, exist_ok=True)
    return repo_id


def _full_name(api: HfApi, repo_id: str, token: str | None) -> str:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is no name of a repository ({error})") from error
    if "/" in repo_id:
        return repo_id
    if not (token or get_token()):
        raise HubError(f"{repo_id}: whose? {_REMEDIES[401]}")
    return f"{_ask(api, repo_id, api.whoami)['name']}/{repo_id}"


def _commit(
    api: HfApi,
    repo_id: str,
    files: dict[str, Path | bytes],
    *,
    private: bool | None,
    revision: str | None,
    **kwargs: Any,
) -> Any:
    """One commit that makes the repository's own files exactly `files`, on top of the state that was looked at."""
    info = api.model_info(repo_id, revision=revision)
    if private and info.private is False:
        raise HubError(f"{repo_id} exists and is public; make it private in its settings, or choose another name")
    there = [sibling.rfilename for sibling in info.siblings or ()]
    stale = [name for name in there if name not in files and any(fnmatch(name, own) for own in OWN_FILES)]
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()),
        *(CommitOperationDelete(path_in_repo=name, is_folder=False) for name in stale),
    ]
    return api.create_commit(repo_id, operations, revision=revision, parent_commit=info.sha, **kwargs)


def _ask(api: HfApi, repo_id: str, function: Any, *args: Any, attempts: int = ATTEMPTS, **kwargs: Any) -> Any:
    """Call the Hub; try again after a dropped connection, an error of the server, or a commit of somebody else.

    Raises: HubError: it cannot be reached, or refuses.
    """
    attempt = 1
    while True:
        try:
            return function(*args, **kwargs)
        except OfflineModeIsEnabled as error:  # a request takes longer
            raise HubError("offline mode is on; unset HF_HUB_OFFLINE to publish a model") from error
        except HubError:
            raise
        except (_TransportError, RuntimeError, ValueError) as error:
            # huggingface_hub wraps what happens in its upload threads in a RuntimeError.
            cause = error if isinstance(error, _TransportError) else error.__cause__
            if not isinstance(cause, _TransportError):
                raise HubError(f"{repo_id}: {error}") from error
            status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
            if attempt == attempts or (status is not None and status < 500 and status != 412):
                raise HubError(f"{repo_id}: {_explanation(api.endpoint, status, cause, attempt)}") from error
            pause = FIRST_PAUSE_S * 2 ** (attempt - 1)
            logger.warning("%s: %s; trying again in %g s", repo_id, cause, pause)
            time.sleep(pause)
            attempt += 1


def _explanation(endpoint: str, status: int | None, error: BaseException, attempts: int) -> str:
    """What happened and what to do about it. `status`: of the answer; None where none came."""
    if status is not None and status < 500:
        said = (getattr(error, "server_message", None) or str(error)).strip().splitlines()[0]
        remedy = _REMEDIES.get(status, "see the message")
        return f"{endpoint} refused with status {status} ({said}): {remedy}. Nothing was published."
    what = f"answered with status {status}" if status else f"could not be reached, or the connection broke ({error})"
    return (
        f"{endpoint} {what}; attempts: {attempts}. The repository holds what it held before or, if only the answer "
        "was lost, all of the new model, never a part. Push again later: what arrived is not sent twice."
    )


def _refuse_secrets(files: dict[str, Path | bytes], token: str | None) -> None:
    """A command line or a config with an access token in it must not become public.

    Raises: HubError: it names the file.
    """
    secret = (token or get_token() or "").encode()
    for name, content in files.items():
        if name.endswith((".safetensors", ".png")):
            continue
        data = content if isinstance(content, bytes) else content.read_bytes()
        if _TOKEN.search(data) or (secret and secret in data):
            raise HubError(f"{name} holds what looks like an access token of the Hub; remove it before publishing")
