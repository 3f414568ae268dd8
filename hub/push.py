"""Publish a finished run, or any folder that holds a captioner or an adapter, on the Hugging Face Hub.

    qformer-captioner push outputs/own_images somebody/my-captioner --private

All files go in one commit: weights, code, processor, card and pictures, and nothing else. What an adapter is on goes to
REPO_ID-base where it lies in a folder of this machine, as `train_hf.py` leaves it.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, PROCESSOR_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from ..common.arguments import CommandParser
from ..common.command import run_command
from ..common.errors import UNUSABLE, InputError, cannot_use
from .layout import CARD, is_published

WAITS = (1, 4)  # seconds before another try


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    license: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload captioner",
    adapter: str | None = None,
) -> str:
    """Put a captioner or an adapter into a repository, as one commit, and return the repository's id.

    Args:
        folder: of `save_pretrained` or of a run.
        repo_id: the repository, with or without the owner; made if it is not there.
        private: who may see a new one; by default as its owner's settings say.
        revision: the branch, `main` by default; made if it is not there.
        license: of the repository, for its card.
        token: by default the one of `hf auth login` or `HF_TOKEN`.
        commit_message: title of the commit.
        adapter: the repository of the adapters that this is the captioner below.

    Raises:
        InputError: if the folder is no captioner that others could open, or the Hub does not take it.
    """
    folder = Path(folder)
    with _readable(folder):
        base = check(folder)
    repo_id = open_repository(repo_id, private, revision, token)
    hub = {"private": private, "revision": revision, "token": token, "commit_message": commit_message}
    own_base = base if base is not None and Path(base).is_dir() else None
    with _readable(folder):  # before anything is published: an adapter must not stay behind its new base
        files = collect(folder, repo_id, base if own_base is None else f"{repo_id}-base", license, adapter)
    if own_base is not None:
        _insist(lambda: _refuse_another_model(f"{repo_id}-base", token), repo_id)
        publish(own_base, f"{repo_id}-base", license=license, adapter=repo_id, **hub)
    _insist(lambda: _commit(files, repo_id, revision, token, commit_message), repo_id)
    return repo_id


def check(folder: Path) -> str | None:
    """See that a folder can be published; returns what its adapter is on, `None` if it is a captioner itself.

    Raises:
        InputError: if not; the message says why, and what to do.
    """
    from ..configuration_qformer import is_hub_id

    if not folder.is_dir():
        raise InputError(f"There is no folder {str(folder)!r}.")
    record = folder / "run.json"
    if record.is_file() and read_json(record).get("finished") is None:
        raise InputError(f"The run in {str(folder)!r} has not come to its end: give its command again, then push.")
    adapter = (folder / ADAPTER_CONFIG_NAME).is_file()
    config = read_json(folder / (ADAPTER_CONFIG_NAME if adapter else CONFIG_NAME))
    if not adapter and config.get("model_type") != "qformer_captioner":
        raise InputError(
            f"{str(folder)!r} holds no captioner (a {CONFIG_NAME} of model_type qformer_captioner) and no adapter "
            f"({ADAPTER_CONFIG_NAME}): push the folder that training or `save_pretrained` wrote."
        )
    weights = [folder / (ADAPTER_SAFE_WEIGHTS_NAME if adapter else SAFE_WEIGHTS_NAME)]
    if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        index = read_json(folder / SAFE_WEIGHTS_INDEX_NAME).get("weight_map")
        names = list(index.values()) if isinstance(index, dict) else []
        if not names or not all(isinstance(name, str) and is_published(name) for name in names):
            raise InputError(f"The {SAFE_WEIGHTS_INDEX_NAME} in {str(folder)!r} is no index of weights: save it again.")
        weights = [folder / name for name in sorted(set(names))]
    for file in weights:
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise InputError(f"The weights {str(file)!r} are missing or damaged ({error}).") from error
    if adapter:
        base = str(config.get("base_model_name_or_path"))
        if Path(base).is_dir():
            check(Path(base))
        elif not is_hub_id(base):
            raise InputError(f"The adapter in {str(folder)!r} is on the captioner {base!r}, which is not there.")
        return base
    for name in ("modeling_qformer.py", PROCESSOR_NAME):
        if not (folder / name).is_file():
            raise InputError(f"There is no {name} in {str(folder)!r}, so nobody could caption with it: save it again.")
    for part in config.get("referenced_backbones") or []:
        if not is_hub_id(name := config.get(f"{part}_name_or_path")):
            raise InputError(
                f"The captioner in {str(folder)!r} refers to the {part.replace('_', ' ')} {name!r}, which only this "
                "machine has: put it in with `qformer-captioner export`, or train with --include_backbones true."
            )
    return None


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Whatever a damaged file of the folder makes somebody raise is one sentence."""
    try:
        yield
    except InputError:
        raise
    except (*UNUSABLE, SafetensorError, yaml.YAMLError) as error:
        raise cannot_use(folder, error) from error


def read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise InputError(f"{str(file)!r} is not valid JSON: {error}.") from error
    return content if isinstance(content, dict) else {}


def collect(
    folder: Path, repo_id: str, base: str | None = None, license: str | None = None, adapter: str | None = None
) -> dict[str, Path | bytes]:
    """What a repository holds, by path: files as they are, but those that name folders of this machine."""
    from ..configuration_qformer import without_local_paths
    from .model_card import card_for

    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files: dict[str, Path | bytes] = {
        name: path for name, path in paths.items() if name.count("/") <= 1 and is_published(name)
    }
    for name in files:
        if name.endswith("config.json"):
            content = without_local_paths(read_json(paths[name]))
            if name == ADAPTER_CONFIG_NAME:
                content["base_model_name_or_path"] = base
            files[name] = (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
    files[CARD] = card_for(folder, repo_id, base, license, adapter).encode(errors="replace")
    return files


# ----------------------------------------------------------------------------------------------------------------------
# The Hub
# ----------------------------------------------------------------------------------------------------------------------


def open_repository(repo_id: str, private: bool | None, revision: str | None, token: str | None) -> str:
    """Make a repository and its branch unless they are there; returns its id with the owner.

    Raises:
        InputError: if that cannot be.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{repo_id!r} is no name of a repository: {' '.join(str(error).split())}") from error

    def create() -> str:
        api = HfApi(token=token)
        full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and api.model_info(full_id).private is False:  # made before, by somebody who wanted it so
            raise InputError(f"{full_id!r} is there already, and everybody may see it: choose another name.")
        if revision not in (None, "main"):
            api.create_branch(full_id, branch=revision, exist_ok=True)
        return full_id

    return _insist(create, repo_id)


def _refuse_another_model(repo_id: str, token: str | None) -> None:
    """Nobody has asked for REPO_ID-base by name: a model that somebody has there stays."""
    api = HfApi(token=token)
    there = set(api.list_repo_files(repo_id)) if api.repo_exists(repo_id) else set()
    if there - {".gitattributes", CARD} and "modeling_qformer.py" not in there:
        raise InputError(
            f"What the adapter is on would go to {repo_id!r}, and another model is there already: choose another name."
        )


def _commit(files: dict[str, Path | bytes], repo_id: str, revision: str | None, token: str | None, title: str) -> None:
    """One commit, so that a branch is never half of one thing and half of another.

    `upload_folder` would make several where hf_xet is installed. What an earlier push left and this one has not goes.
    """
    api = HfApi(token=token)
    there = api.list_repo_files(repo_id, revision=revision)
    old = [name for name in there if name not in files and is_published(name) and name.count("/") <= 1]
    additions = [CommitOperationAdd(name, content) for name, content in files.items()]
    api.create_commit(
        repo_id,
        [*additions, *(CommitOperationDelete(name) for name in old if not name.startswith("LICENSE"))],
        commit_message=title,
        revision=revision,
    )


def _insist(request, repo_id: str):
    """Try again where the Hub or the connection failed: the client does so for the parts of an upload only.

    A commit that arrived while its answer got lost is made once: the client leaves out files that are there already.
    """
    for wait in (*WAITS, None):
        try:
            return request()
        except InputError:
            raise
        except LocalTokenNotFoundError as error:
            raise InputError("Nobody is logged in to the Hub: hf auth login, or set HF_TOKEN.") from error
        except OfflineModeIsEnabled as error:
            raise InputError("The Hub cannot be asked while HF_HUB_OFFLINE is set.") from error
        except json.JSONDecodeError:
            failure = "the Hub did not answer in JSON"
        except ValueError as error:  # the card
            raise InputError(f"The Hub refuses {repo_id!r}: {' '.join(str(error).split())}") from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status < 500 and status not in (409, 412, 429):  # somebody else at the same time, or too many requests
                reason = {401: "log in with `hf auth login`", 403: "your token may not write there"}.get(status)
                reason = reason or " ".join(str(error.server_message or error).split())
                raise InputError(f"The Hub refuses {repo_id!r} ({status}): {reason}.") from error
            failure = f"the Hub answered {status}"
        except (HTTPError, OSError, RuntimeError) as error:  # the last where a large file did not arrive
            failure = " ".join(str(error).split()) or type(error).__name__
        if wait is None:
            raise InputError(
                f"{repo_id!r} could not be published, {failure}; its branch is as it was before. Try again later."
            )
        time.sleep(wait)


def push(words: list[str]) -> None:
    """Publish the folder that a command line names."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("folder", help="of a run, or of `save_pretrained`: a captioner, or an adapter on one")
    parser.add_argument("repo_id", help="repository on the Hub, with or without the owner; made if it is not there")
    parser.add_argument("--private", action="store_true", default=None, help="let only its owner see a new repository")
    parser.add_argument("--revision", help="branch, such as v1; by default main")
    parser.add_argument("--license", help="of the repository, such as apache-2.0; by default that of its backbones")
    parser.add_argument("--commit_message", default="Upload captioner", help="title of the commit")
    options = vars(parser.parse_args(words))
    folder, repo_id = options.pop("folder"), options.pop("repo_id")
    repo_id = publish(folder, repo_id, **options)
    print(f"{folder} is in {HfApi().endpoint}/{repo_id}.")


def main() -> None:
    run_command(push)


if __name__ == "__main__":
    main()
