"""An upload of a published folder is whole or nothing, whatever fails. `test_publish.py` makes a real one."""

import huggingface_hub.constants
import pytest
from huggingface_hub import HfApi

from processing.publishing.publication import complete_or_nothing
from processing.publishing.upload import UploadError, upload
from tests.helpers.shipping import contents
from tests.helpers.stand_in_hub import REPO_ID, StandInHub, assert_holds


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with StandInHub().running() as server:
        yield server


def push(server, folder, **options):
    return upload(folder, REPO_ID, api=HfApi(endpoint=server.url, token="hf_test"), **options)


@pytest.fixture
def published(tmp_path):
    """A publication of small and large files; uploading looks into none but its record."""
    with complete_or_nothing(tmp_path / "published") as (made, record):
        (made / "samples").mkdir()
        for name in ("model.safetensors", "config.json", "samples/1.wav", "samples/2.wav"):
            (made / name).write_text(f"contents of {name}")
        (made / "README.md").write_text("---\nlicense: mit\n---\n")
        record["facts"] = {}
    return tmp_path / "published"


@pytest.fixture
def newer(published, tmp_path):
    """Another publication of the same name: other weights, one sample less."""
    with complete_or_nothing(tmp_path / "newer") as (made, record):
        for name in set(contents(published)) - {"publication.json", "samples/2.wav"}:
            (made / name).parent.mkdir(exist_ok=True)
            (made / name).write_bytes((published / name).read_bytes() + b" " * (name != "samples/1.wav"))
        record["facts"] = {}
    return tmp_path / "newer"


def test_it_is_uploaded_in_one_commit(server, published):
    info = push(server, published, private=True)
    assert server.private is True and info.commit_url.startswith(server.url)
    assert len(server.committed) == 1
    assert_holds(server, published)


def test_a_newer_one_replaces_it_and_leaves_other_files_alone(server, published, newer):
    push(server, published)
    server.files["notes.md"] = b"somebody's work"
    push(server, newer)
    assert server.committed[1]["samples/2.wav"] == "deletedFile" and len(server.committed) == 2
    assert server.files.pop("notes.md") == b"somebody's work"
    assert_holds(server, newer)


def test_repeating_it_sends_nothing(server, published):
    push(server, published)
    sent = list(server.put)
    push(server, published)
    assert len(server.committed) == 1 and server.put == sent


@pytest.mark.parametrize(
    "method, path, fault, advice",
    [
        ("POST", "repos/create", 401, "hf auth login"),
        ("POST", "preupload", 403, "right to write"),
        ("POST", "objects/batch", 403, "right to write"),
        ("PUT", "large", 413, "larger than the server takes"),
        ("PUT", "large", "before", "See above what failed"),
        ("PUT", "large", 500, "See above what failed"),
        ("POST", "commit", 409, "Somebody else"),
        ("POST", "commit", 412, "Somebody else"),
        ("POST", "commit", "before", "See above what failed"),
        ("POST", "commit", "after", "See above what failed"),
    ],
)
def test_a_failed_upload_leaves_the_old_or_the_new_state(method, path, fault, advice, server, published, newer):
    if "create" not in path:  # else the repository would be found
        push(server, published)
    old, local = dict(server.files), contents(newer)
    server.fail(method, path, fault)
    with pytest.raises(UploadError, match=advice) as caught:
        push(server, newer)
    assert "Repeat the command" in str(caught.value) and contents(newer) == local
    if fault == "after":
        assert_holds(server, newer)
    else:
        assert server.files == old
    server.faults.clear()
    sent = list(server.put)
    push(server, newer)
    assert_holds(server, newer)
    assert len(server.put) == len(set(server.put)), "no large file is sent twice"
    if path == "commit":
        assert server.put == sent, "all of them had arrived"


def test_one_dropped_connection_is_survived(server, published):
    server.fail("PUT", "large", "before", times=1)
    push(server, published)
    assert_holds(server, published)


def test_a_commit_of_somebody_else_meanwhile_is_not_overwritten(server, published, newer, monkeypatch):
    push(server, published)
    create_commit = HfApi.create_commit

    def later(self, *arguments, **options):
        server.num_commits += 1
        return create_commit(self, *arguments, **options)

    monkeypatch.setattr(HfApi, "create_commit", later)
    with pytest.raises(UploadError, match="Somebody else has changed"):
        push(server, newer)
    assert_holds(server, published)
