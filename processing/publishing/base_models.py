"""The base models under the names by which others find them: a thin checkpoint that is published names Hub ids.

Leaves out: where this machine has them, which the user of `publish.py` says (`--backbones`), and the card (`facts.py`).
"""

import os

from modeling_blsp_kd.backbone_names import trained_revision

OPTIONS = {"audio_tower": "speech_model", "language_model": "text_model"}
Backbones = dict[str, dict[str, str]]


def public_backbones(stored: Backbones, given: dict[str, tuple[str, str | None]]) -> Backbones:
    """Return the `backbones` of a published thin checkpoint's config.

    A backbone that training had from the Hub stays pinned to its commit. One that came from a folder is named by the
    Hub id that the user gives, and the checksum that training saw stays beside it; loading fetches the newest commit
    and compares.

    Args:
        stored: those of the checkpoint's config.
        given: Hub id and licence of `"speech_model"` and `"text_model"`, where the user names them.

    Raises:
        ValueError: a backbone has no Hub id, or the user names another than the checkpoint does.
    """
    public, local = {}, []
    for part, entry in stored.items():
        stored_name = entry["name_or_path"]
        name, _ = given.get(OPTIONS[part], (stored_name, None))
        if os.path.isabs(name):
            local.append(part)
        elif os.path.isabs(stored_name):
            public[part] = {"name_or_path": name, "trained_revision": trained_revision(entry)}
        elif name != stored_name:
            raise ValueError(
                f"--{OPTIONS[part]} says {name}, but the checkpoint was made from {stored_name}. Leave it out, or "
                "correct it."
            )
        else:
            public[part] = entry
    if local:
        options = " and ".join(f"--{OPTIONS[part]} ID" for part in local)
        raise ValueError(
            f"This checkpoint is thin, and its {' and '.join(local)} came from a folder of this machine, which others "
            f"do not have. Name the model on the Hub that it is ({options}), or publish with --full."
        )
    return public


def local_folders(public: Backbones, found: Backbones) -> dict[str, str]:
    """Return the folder of each base model that this machine has in one, by Hub id.

    Args:
        public: see [`public_backbones`].
        found: `config.backbones` of the loaded model.
    """
    places = {public[part]["name_or_path"]: found[part]["name_or_path"] for part in public}
    return {name: place for name, place in places.items() if os.path.isabs(place)}


def other_revisions(found: Backbones) -> dict[str, str]:
    """Return the revision of each base model that this machine has in another one than training saw.

    Args:
        found: see [`local_folders`].
    """
    return {part: entry["revision"] for part, entry in found.items() if "trained_revision" in entry}
