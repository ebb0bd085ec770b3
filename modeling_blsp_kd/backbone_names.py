"""Where a thin checkpoint finds its backbones, and which revision of them its training saw: `config.backbones`.

Leaves out: loading them (`backbones.py`).

The config has one entry, a dict, for each of `BACKBONES`:

- `name_or_path`: Hub id or folder.
- `revision`: what is loaded from there, and nothing else: a commit on the Hub, or the checksum of a folder's weight
  files. It may be omitted beside the next one; then what lies there now is loaded.
- `trained_revision`: commit or checksum of what training saw, where that is not `revision`.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging
from transformers.utils.hub import cached_file, extract_commit_hash

from .config_options import BACKBONES, is_text, require

logger = logging.get_logger(__name__)

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
WEIGHT_SUFFIXES = (".safetensors", ".bin")
CHECKSUM = "sha256:"
ON_OTHER_REVISION = ("warn", "error")
# What the weights of a thin checkpoint were trained to fit, by the names of transformers.
ARCHITECTURE = {
    "audio_tower": ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_mel_bins"),
    "language_model": (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("intermediate_size", "vocab_size"),
    ),
}


def check_backbones(given: Any):
    """Check what a thin checkpoint's config says about its backbones.

    Raises:
        ValueError: it is neither None nor an entry for each.
    """
    require(
        given is None
        or isinstance(given, dict)
        and set(given) == set(BACKBONES)
        and all(map(_is_entry, given.values())),
        f"backbones must be None, or give name_or_path and revision (text) of each of {BACKBONES}",
        given,
    )


def _is_entry(given: Any) -> bool:
    if not isinstance(given, dict):
        return False
    keys = set(given)
    is_complete = "name_or_path" in keys and bool(keys & {"revision", "trained_revision"})
    return (
        is_complete and keys <= {"name_or_path", "revision", "trained_revision"} and all(map(is_text, given.values()))
    )


def trained_revision(backbone: dict[str, str]) -> str:
    """Return commit or checksum of the weights of a backbone that training saw, from its entry."""
    return backbone.get("trained_revision") or backbone["revision"]


def with_other_names(stored: dict[str, dict[str, str]] | None, given: Any) -> dict[str, dict[str, str]]:
    """Return the entries of a thin checkpoint's config with other places for some backbones; what training saw stays.

    Args:
        stored (`dict`, *optional*): the config's `backbones`.
        given (`dict`): for some of `BACKBONES` a Hub id or a folder, or a dict of `name_or_path` and `revision`.

    Raises:
        ValueError: it is none of these, or the checkpoint is full.
    """
    if stored is None:
        raise ValueError(
            f"backbones={given!r:.200} names those of a thin checkpoint, but this one is full: it holds its backbones "
            "itself. Leave the argument out."
        )
    require(
        isinstance(given, dict) and set(given) <= set(BACKBONES),
        f"backbones must be a dict that gives a Hub id or a folder for some of {BACKBONES}",
        given,
    )
    entries = dict(stored)
    for part, name in given.items():
        entry = dict(name) if isinstance(name, dict) else {"name_or_path": name}
        trained = trained_revision(stored[part])
        if isinstance(entry.get("name_or_path"), os.PathLike):
            entry["name_or_path"] = os.fspath(entry["name_or_path"])
        require(
            _is_entry({"trained_revision": trained, **entry}) and entry.get("trained_revision", trained) == trained,
            f"backbones must give for {part} a Hub id, a folder, or a dict of name_or_path and revision",
            name,
        )
        entry.pop("trained_revision", None)
        entries[part] = entry if entry.get("revision") == trained else {**entry, "trained_revision": trained}
    return entries


def identify(name_or_path: str | os.PathLike, loading_options: dict) -> dict[str, str]:
    """Name a backbone so that the same weights can be fetched again.

    Args:
        name_or_path (`str` or `os.PathLike`): Hub id or folder.
        loading_options (`dict`): what it will be loaded with, such as `revision`.

    Returns:
        `dict` of `name_or_path`, and `revision`: the commit on the Hub, or the checksum of a folder's weight files.
    """
    if os.path.isdir(name_or_path):
        return {"name_or_path": os.path.abspath(name_or_path), "revision": checksum(name_or_path)}
    commit = extract_commit_hash(_config_file(name_or_path, loading_options), None)
    if commit is None:
        raise ValueError(
            f"The commit of {name_or_path} is unknown, so a thin checkpoint could not name it. Load it from the Hub or "
            "from a folder, or build the model with thin=False."
        )
    return {"name_or_path": str(name_or_path), "revision": commit}


def as_found(
    part: str, backbone: dict[str, str], loading_options: dict, on_other_revision: str = "warn"
) -> dict[str, str]:
    """Return the entry of a backbone that was loaded, and say so if training saw another revision.

    Args:
        part (`str`): of `BACKBONES`, for messages.
        backbone (`dict`): its entry, which names what training saw apart from what is loaded.
        loading_options (`dict`): what it was loaded with.
        on_other_revision (`str`): "warn" or "error".

    Raises:
        ValueError: it is another revision, and this is to be an error.
    """
    trained, found = trained_revision(backbone), identify(backbone["name_or_path"], loading_options)
    is_download = trained.startswith(CHECKSUM) and not found["revision"].startswith(CHECKSUM)
    if trained == found["revision"] or is_download and trained == _checksum_of_download(found, loading_options):
        return found
    message = (
        f"The {part} is another revision than in training: this thin checkpoint was trained on {described(trained)}; "
        f"found was {found['name_or_path']}, {described(found['revision'])}."
    )
    if on_other_revision == "error":
        raise ValueError(
            f'{message} Name the one of training in backbones={{"{part}": ...}}, or load with on_other_revision="warn".'
        )
    logger.warning(
        f'{message} Answers may be worse than those that were measured. on_other_revision="error" makes this an error.'
    )
    return {**found, "trained_revision": trained}


def as_trained(backbones: dict[str, dict[str, str]] | None) -> dict[str, dict[str, str]] | None:
    """Return the entries of a model that is trained further: from now on, training sees what was loaded."""
    if backbones is None:
        return None
    return {
        part: {
            "name_or_path": backbone["name_or_path"],
            "revision": backbone.get("revision", trained_revision(backbone)),
        }
        for part, backbone in backbones.items()
    }


def check_architecture(part: str, name_or_path: str, own: PreTrainedConfig, in_training: PreTrainedConfig):
    """Check that a backbone has the architecture of the one in training.

    Args:
        part (`str`), name_or_path (`str`): of the backbone, for messages.
        own (`PreTrainedConfig`), in_training (`PreTrainedConfig`): its own config, and that in the checkpoint's.

    Raises:
        ValueError: it has another one.
    """
    own, in_training = (
        config.get_text_config() if part == "language_model" else getattr(config, "encoder_config", config)
        for config in (own, in_training)
    )
    names = ("model_type",) if own.model_type != in_training.model_type else ARCHITECTURE[part]
    pairs = [(name, getattr(own, name, None), getattr(in_training, name, None)) for name in names]
    # A config may leave out what follows from its other options.
    differing = [
        f"{name} is {its} instead of {wanted}" for name, its, wanted in pairs if its and wanted and its != wanted
    ]
    if differing:
        raise ValueError(
            f"{name_or_path} cannot be the {part} of this thin checkpoint, which was trained for another architecture: "
            f"{'; '.join(differing)}. Name the model that it was trained on, or a revision of it."
        )


def checksum(folder: str | os.PathLike) -> str:
    """Return the SHA-256 over the names and contents of a folder's weight files."""
    digest = hashlib.sha256()
    for file in sorted(path for path in Path(folder).iterdir() if path.suffix in WEIGHT_SUFFIXES):
        with file.open("rb") as stream:
            digest.update(f"{file.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\0".encode())
    return f"{CHECKSUM}{digest.hexdigest()}"


def _checksum_of_download(found: dict[str, str], loading_options: dict) -> str:
    return checksum(Path(_config_file(found["name_or_path"], loading_options)).parent)


def _config_file(name: str | os.PathLike, loading_options: dict) -> str:
    hub = {option: loading_options[option] for option in HUB_OPTIONS if option in loading_options}
    return cached_file(name, "config.json", **hub)


def described(revision: str) -> str:
    """Return the words for a commit or a checksum."""
    return f"weights with the checksum {revision}" if revision.startswith(CHECKSUM) else f"the commit {revision}"
