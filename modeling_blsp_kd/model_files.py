"""Check the files of a model's folder before transformers reads them, whose errors would not name the file.

Follows the formats of safetensors and of transformers' index of shards; of weight files it reads only the headers.
Leaves out: the Hub, whose files huggingface_hub checks when it fetches them, and pickles, which torch itself refuses.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME

CHECK_CONFIG = "Check its options against those of a model of that type."
REMEDY = "Copy the folder again from where it came, or save the model anew (save_pretrained)."
# Errors about the environment rather than the file's contents. An OSError also names its file.
NOT_OF_CONTENT = (OSError, ImportError, MemoryError, RuntimeError)


@contextmanager
def explained(problem: str, remedy: str = REMEDY) -> Iterator[None]:
    """Turn another library's error about the content of a file into a ValueError that says which content is wrong."""
    try:
        yield
    except NOT_OF_CONTENT:
        raise
    except Exception as error:
        raise ValueError(f"{problem}: {type(error).__name__}: {str(error)[:500]}. {remedy}") from error


def check_config(name_or_path: str | os.PathLike, content: Any):
    """Raise an OSError unless something was read from a config file.

    For a missing one transformers gives an empty dict, which would stand for its defaults.
    """
    if not isinstance(content, dict) or not content:
        raise OSError(
            f"{name_or_path} has no config.json, or none with options. Name the folder or repository of a BLSP-KD "
            "model, as save_pretrained writes it."
        )


def check_folder(name_or_path: str | os.PathLike, subfolder: str = "", variant: str | None = None):
    """Check what `from_pretrained` would read from a folder beside its config: weights and generation config.

    Args:
        name_or_path (`str` or `os.PathLike`): folder; a Hub id passes unchecked.
        subfolder (`str`), variant (`str`, *optional*): as in `from_pretrained`.

    Raises:
        FileNotFoundError: an index of shards names a file that is not there.
        ValueError: a file is broken, or an index names a file outside the folder.
    """
    if name_or_path is None or not os.path.isdir(name_or_path):
        return
    folder = Path(name_or_path, subfolder)
    weights = folder / _of_variant(SAFE_WEIGHTS_NAME, variant)
    if weights.is_file():
        _tensor_names(weights)
    else:
        for name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
            if (index := folder / _of_variant(name, variant)).is_file():
                _check_shards(index, is_safetensors=name == SAFE_WEIGHTS_INDEX_NAME)
    if (generation_config := folder / GENERATION_CONFIG_NAME).is_file():
        with explained(f"{generation_config} cannot be read"):
            GenerationConfig.from_pretrained(folder)


def _tensor_names(path: Path) -> set[str]:
    """Return the names of the tensors in a safetensors file; its header must be right and fit the file's length."""
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except SafetensorError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is no whole safetensors file: {error}. {REMEDY}"
        ) from error


def _check_shards(index: Path, is_safetensors: bool):
    with explained(f"{index} cannot be read"):
        content = json.loads(index.read_bytes())
    content = content if isinstance(content, dict) else {}
    weight_map = content.get("weight_map") if isinstance(content.get("metadata"), dict) else None
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(name, str) for name in weight_map.values())):
        raise ValueError(
            f"{index} must hold an object of 'metadata', an object, and 'weight_map', from names of tensors to names "
            f"of files. {REMEDY}"
        )
    for name in sorted(set(weight_map.values())):
        shard = index.parent / name
        if Path(name).name != name:
            raise ValueError(
                f"{index} names the file {name!r:.200}, but shards are read only from the folder of their index. "
                "If you trust that file, put it there."
            )
        if not shard.is_file():
            raise FileNotFoundError(f"{shard} is missing, which {index.name} names. {REMEDY}")
        if not is_safetensors:
            continue
        missing = {tensor for tensor, file in weight_map.items() if file == name} - _tensor_names(shard)
        if missing:
            raise ValueError(
                f"{shard} lacks {sorted(missing)[:5]} ({len(missing)} in all), which {index.name} says it holds. "
                f"{REMEDY}"
            )


def check_fit(name_or_path: str | os.PathLike | None, misfits: Iterable[tuple]):
    """Raise a ValueError if there are weights that do not fit: (name, stored shape, shape in the model) of each."""
    listed = [f"{name} is {stored} instead of {own}" for name, stored, own in sorted(misfits)]
    if listed:
        raise ValueError(
            f"The weights of {name_or_path} do not fit its config: {'; '.join(listed[:5])} ({len(listed)} in all). "
            "Load them with their own config, or save the model anew."
        )


def check_complete(name_or_path: str | os.PathLike, missing: Iterable[str]):
    """Raise a ValueError if there are weights that a config asks for and that the files do not hold, by their names."""
    if listed := sorted(missing):
        raise ValueError(
            f"{name_or_path} lacks weights that the config asks for, which would be random: {listed[:5]} "
            f"({len(listed)} in all). Load it with its own config; only plora may be switched while loading. Another "
            "adapter or LLM is joined, and trained, by from_backbones."
        )


def _of_variant(name: str, variant: str | None) -> str:
    """Return a variant's file name as transformers makes it: model.safetensors -> model.fp16.safetensors."""
    stem, suffix = name.rsplit(".", 1)
    return name if variant is None else f"{stem}.{variant}.{suffix}"
