"""Publish the folder of a run, of a captioner or of an adapter on the Hugging Face Hub.

    qformer-captioner push outputs/own_images somebody/my-captioner --private

One commit holds weights, code, processor, model card and pictures. No other file of the folder is published. If the
folder holds an adapter on a captioner in a local folder, that captioner is published first, as REPO_ID-base.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from ..common.arguments import CommandParser
from ..common.command import run_command
from ..common.errors import UNUSABLE, InputError, cannot_use, one_line
from ..common.logging import get_logger
from .layout import check_folder, is_published, read_json

logger = get_logger(__name__)

T = TypeVar("T")
RETRY_DELAYS = (1, 4)  # seconds


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    license: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload captioner",
    adapter_id: str | None = None,
) -> str:
    """Upload a captioner or an adapter to a repository, in one commit.

    Args:
        folder: folder that a run or `save_pretrained` wrote.
        repo_id: repository, with or without its owner. It is created if it does not exist.
        private: whether a new repository is private. By default its owner's settings decide.
        revision: branch, by default `main`. It is created if it does not exist.
        license: licence for the model card, by default the licences of the backbones.
        token: access token, by default that of `hf auth login` or `HF_TOKEN`.
        commit_message: title of the commit.
        adapter_id: repository of the adapter, if this captioner is its base.

    Returns:
        The repository id with its owner.

    Raises:
        InputError: if others could not load the folder, or if the Hub refuses or does not answer.

    Example:

    ```python
    >>> publish("outputs/own_images", "my-captioner", private=True, license="apache-2.0")  # doctest: +SKIP
    'somebody/my-captioner'
    ```
    """
    folder = Path(folder)
    with _explain_damage(folder):
        base = check_folder(folder)
    repo_id = open_repository(repo_id, private, revision, token)
    local_base = base if base is not None and Path(base).is_dir() else None
    local_base_id = f"{repo_id}-base"
    with _explain_damage(folder):  # before the base is published
        files = collect_files(folder, repo_id, base if local_base is None else local_base_id, license, adapter_id)
    if local_base is not None:
        _check_base_repository(local_base_id, token)
        publish(
            local_base,
            local_base_id,
            private=private,
            revision=revision,
            license=license,
            token=token,
            commit_message=commit_message,
            adapter_id=repo_id,
        )
    _call_hub(lambda: _commit(files, repo_id, revision, token, commit_message), repo_id)
    return repo_id


def collect_files(
    folder: Path,
    repo_id: str,
    base_id: str | None = None,
    license: str | None = None,
    adapter_id: str | None = None,
) -> dict[str, Path | bytes]:
    """Return the files to publish, by their path in the repository.

    Configurations lose the paths of local folders, and the model card is written for the repository. All other files
    are published unchanged.

    Args:
        folder: folder that a run or `save_pretrained` wrote.
        repo_id: repository, with its owner.
        base_id: Hub id of the captioner that an adapter belongs to.
        license: licence for the model card.
        adapter_id: repository of the adapter, if this captioner is its base.
    """
    from ..configuration_qformer import without_local_paths  # imports torch
    from .model_card import card_for_hub

    files: dict[str, Path | bytes] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or not is_published(name):
            continue
        files[name] = path
        if name.endswith("config.json"):
            config = without_local_paths(read_json(path))
            if name == ADAPTER_CONFIG_NAME:
                config["base_model_name_or_path"] = base_id
            files[name] = (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
    files[REPOCARD_NAME] = card_for_hub(folder, repo_id, base_id, license, adapter_id).encode(errors="replace")
    return files


@contextlib.contextmanager
def _explain_damage(folder: Path) -> Iterator[None]:
    """Convert errors of a damaged file to an `InputError` that names the folder."""
    try:
        yield
    except InputError:
        raise
    except (*UNUSABLE, SafetensorError, yaml.YAMLError) as error:
        raise cannot_use(folder, error) from error


# ----------------------------------------------------------------------------------------------------------------------
# Requests to the Hub
# ----------------------------------------------------------------------------------------------------------------------


def open_repository(repo_id: str, private: bool | None, revision: str | None, token: str | None) -> str:
    """Create a repository and its branch unless they exist; return the repository id with its owner.

    Raises:
        InputError: if the id is not valid, an existing public repository should be private, or the Hub refuses.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{repo_id!r} is not a valid repository id: {one_line(error)}") from error

    def create() -> str:
        api = HfApi(token=token)
        full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and api.model_info(full_id).private is False:
            raise InputError(f"{full_id!r} exists already and is public: choose another name, or omit --private.")
        if revision not in (None, "main"):
            api.create_branch(full_id, branch=revision, exist_ok=True)
        return full_id

    return _call_hub(create, repo_id)


def _check_base_repository(base_id: str, token: str | None) -> None:
    """Check that REPO_ID-base is new or holds a captioner.

    The user did not choose this name, so another model must not be replaced.

    Raises:
        InputError: if it holds another model, or the Hub refuses.
    """

    def list_files() -> set[str]:
        api = HfApi(token=token)
        return set(api.list_repo_files(base_id)) if api.repo_exists(base_id) else set()

    files = _call_hub(list_files, base_id)
    if files - {".gitattributes", REPOCARD_NAME} and "modeling_qformer.py" not in files:
        raise InputError(
            f"The captioner below the adapter would be published as {base_id!r}, which already holds another model: "
            "choose another name."
        )


def _commit(files: dict[str, Path | bytes], repo_id: str, revision: str | None, token: str | None, title: str) -> None:
    """Upload files in one commit, so that a branch never holds a part of an upload.

    `upload_folder` makes several commits where hf_xet is installed. Files of an earlier upload that are not uploaded
    again are deleted, except licences.
    """
    api = HfApi(token=token)
    stale = [
        name
        for name in api.list_repo_files(repo_id, revision=revision)
        if name not in files and is_published(name) and not name.startswith("LICENSE")
    ]
    api.create_commit(
        repo_id,
        [*(CommitOperationAdd(*file) for file in files.items()), *(CommitOperationDelete(name) for name in stale)],
        commit_message=title,
        revision=revision,
    )


def _call_hub(request: Callable[[], T], repo_id: str) -> T:
    """Run a request, and repeat it after temporary failures. huggingface_hub itself retries only parts of uploads.

    A commit can be repeated safely if its response was lost, because huggingface_hub leaves out unchanged files.

    Raises:
        InputError: if the Hub refuses, or if the last attempt fails.
    """
    delays = list(RETRY_DELAYS)
    while True:
        try:
            return request()
        except InputError:
            raise
        except LocalTokenNotFoundError as error:
            raise InputError("You are not logged in to the Hub: run `hf auth login`, or set HF_TOKEN.") from error
        except OfflineModeIsEnabled as error:
            raise InputError("The Hub cannot be reached while HF_HUB_OFFLINE is set: unset it.") from error
        except json.JSONDecodeError:
            failure = "the Hub did not answer in JSON"
        except ValueError as error:  # from huggingface_hub, for a card that the Hub does not accept
            raise InputError(f"The Hub refuses {repo_id!r}: {one_line(error)}") from error
        except HfHubHTTPError as error:
            if not _is_temporary(error):
                raise _refusal(repo_id, error) from error
            failure = f"the Hub answered {error.response.status_code}"
        except (HTTPError, OSError, RuntimeError) as error:  # a RuntimeError if a large file did not arrive
            failure = one_line(error) or type(error).__name__
        if not delays:
            raise InputError(
                f"{repo_id!r} could not be published ({failure}); its branch has not changed. Try again later."
            )
        time.sleep(delays.pop(0))


def _is_temporary(error: HfHubHTTPError) -> bool:
    """Return True for server errors, concurrent commits (409, 412) and too many requests (429)."""
    return error.response.status_code >= 500 or error.response.status_code in (409, 412, 429)


def _refusal(repo_id: str, error: HfHubHTTPError) -> InputError:
    status = error.response.status_code
    remedies = {401: "log in with `hf auth login`", 403: "your token may not write there"}
    reason = remedies.get(status) or one_line(error.server_message or error)
    return InputError(f"The Hub refuses {repo_id!r} ({status}): {reason}.")


def push_command(words: list[str]) -> None:
    """Publish the folder that a command line names."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("folder", help="Folder of a run, of a captioner or of an adapter.")
    parser.add_argument(
        "repo_id", help="Repository on the Hub, with or without its owner. It is created if it does not exist."
    )
    parser.add_argument("--private", action="store_true", default=None, help="Make a new repository private.")
    parser.add_argument("--revision", help="Branch to publish to, such as v1. By default main.")
    parser.add_argument(
        "--license", help="Licence for the model card, such as apache-2.0. By default the licences of the backbones."
    )
    parser.add_argument("--commit_message", default="Upload captioner", help="Title of the commit.")
    options = vars(parser.parse_args(words))
    folder, repo_id = options.pop("folder"), options.pop("repo_id")
    repo_id = publish(folder, repo_id, **options)
    logger.info("%s is published at %s/%s.", folder, HfApi().endpoint, repo_id)


def main() -> None:
    """Run the command `qformer-captioner push`."""
    run_command(push_command)


if __name__ == "__main__":
    main()
