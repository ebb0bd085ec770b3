"""Upload a published folder to the Hub, in one commit.

Uses huggingface_hub's `create_commit`: `upload_folder` may make several commits of a large folder, and a model of which
half is new cannot be loaded. Files of an earlier publication that this one has not are deleted, all others of the
repository are left alone. Leaves out: tokens and endpoints, which huggingface_hub finds (`hf auth login`, HF_TOKEN).
"""

import json
import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError

from .publication import RECORD, recorded_files

ADVICE = {
    401: "Log in with `hf auth login`, or set HF_TOKEN to a valid token.",
    403: "The token needs the right to write to this repository.",
    404: "The repository or its owner does not exist, or the token does not see it.",
    409: "Somebody else is changing the repository.",
    412: "Somebody else has changed the repository meanwhile.",
    413: "A file is larger than the server takes.",
}


class UploadError(RuntimeError):
    """An upload that did not succeed: what happened, what the repository holds now, what to do."""


def upload(folder: Path, repo_id: str, private: bool | None = None, api: HfApi | None = None) -> CommitInfo:
    """Upload a publication.

    Args:
        folder (`str` or `os.PathLike`): as `publish.py` wrote it.
        repo_id (`str`): "owner/name"; made if it does not exist.
        private (`bool`, *optional*): of a new repository; omitted: as its owner's settings say.

    Raises:
        UploadError: the repository still holds what it held before, or, if only the answer to the commit was lost,
            the whole publication; never a part of it.
    """
    folder, api = Path(folder), api or HfApi()
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        info = api.model_info(repo_id)
        present = {sibling.rfilename for sibling in info.siblings or []}
        gone = sorted((_earlier_files(api, repo_id, info.sha) if RECORD in present else set()) & present - set(files))
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationDelete(path) for path in gone),
                *(CommitOperationAdd(path_in_repo=path, path_or_fileobj=folder / path) for path in files),
            ],
            commit_message="Publish a BLSP-KD model",
            # Somebody else's commit meanwhile is refused, not overwritten.
            parent_commit=info.sha,
        )
    except Exception as error:  # of whatever kind, it leaves the same state
        advice = ADVICE.get(_status(error) or 0, "See above what failed.")
        raise UploadError(
            f"The upload to {repo_id} failed: {type(error).__name__}: {error}\n{advice} {repo_id} holds what it held "
            f"before or, if only the server's answer was lost, all of the new state. {folder} is complete and "
            "unchanged. Repeat the command: only what is missing is sent."
        ) from error


def _earlier_files(api: HfApi, repo_id: str, commit: str) -> set[str]:
    with tempfile.TemporaryDirectory() as made:
        record = api.hf_hub_download(repo_id, RECORD, revision=commit, local_dir=made)
        return set(recorded_files(json.loads(Path(record).read_text())))


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status that an error came from, if any."""
    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return None if error is None or error.response is None else error.response.status_code
