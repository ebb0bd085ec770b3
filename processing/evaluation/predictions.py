"""Keep the predictions of systems on disk: one JSON line per row, written batch by batch, so that a rerun continues.

Leaves out: writing by several processes at once.
"""

import json
from argparse import Namespace
from pathlib import Path

from modeling_blsp_kd import BlspKdConfig
from modeling_blsp_kd.backbone_names import identify
from modeling_blsp_kd.training.command_line import read_backbone_options
from processing.audio_loading import load_audio

from .systems import Systems

READING = ("text", "blind")  # all other systems hear the clip


class Predictions:
    """The file of one system.

    Args:
        folder: of the files.
        system: its name; the file is `SYSTEM.jsonl`, and `SYSTEM.settings.json` beside it.
        settings: what predictions depend on (the model and its weights, the data, ...), of JSON's types.

    Raises:
        ValueError: the file was made with other settings.
    """

    def __init__(self, folder: Path, system: str, settings: dict):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, settings_path = folder / f"{system}.jsonl", folder / f"{system}.settings.json"
        if self.path.exists():
            before = json.loads(settings_path.read_text()) if settings_path.exists() else {}
            differing = {
                name: (before.get(name), settings.get(name))
                for name in sorted(before.keys() | settings.keys())
                if before.get(name) != settings.get(name)
            }
            if differing:
                told = "; ".join(f"{name}: {old!r} then, {new!r} now" for name, (old, new) in differing.items())
                raise ValueError(
                    f"{self.path} was predicted with other settings ({told}). Give another --output, or remove the "
                    "file to predict again."
                )
        else:
            settings_path.write_text(json.dumps(settings, indent=2) + "\n")
            self.path.touch()
        self.by_id = {line["id"]: line for line in self._read()}

    def _read(self) -> list[dict]:
        """Return all complete lines; remove an incomplete last line, which a killed process left."""
        contents = self.path.read_bytes()
        whole = contents[: contents.rfind(b"\n") + 1]
        if len(whole) < len(contents):
            self.path.write_bytes(whole)
        return [json.loads(line) for line in whole.splitlines()]

    def append(self, lines: list[dict]):
        with self.path.open("a") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self.by_id.update((line["id"], line) for line in lines)


def settings_of(system: str, options: Namespace, data: str, asr_model: str | None = None) -> dict:
    """Return what the predictions of a system depend on.

    Args:
        options: those of `examples/evaluate.py`.
        data: the name of the data, which changes when the data does.
        asr_model: of a cascade; the model itself if omitted.
    """
    settings = {"model": identify(options.model, {})["revision"], "data": data, "tasks": list(options.tasks)}
    settings |= {name: getattr(options, name) for name in ("max_new_tokens", "translation_instruction")}
    if options.engine_url:
        settings["answered_by"] = "a server"
    if options.chat_template_kwargs:
        settings["chat_template_kwargs"] = options.chat_template_kwargs
    if options.transcription_instruction:
        settings["transcription_instruction"] = options.transcription_instruction
    if options.backbones:
        backbones = BlspKdConfig.from_pretrained(options.model, **read_backbone_options(options)).backbones
        settings["backbones"] = [identify(each["name_or_path"], each)["revision"] for each in backbones.values()]
    if options.train_manifest:
        settings["train_manifest"] = Path(options.train_manifest).name
    if system.startswith("cascade"):
        settings["asr_model"] = identify(asr_model or options.model, {})["revision"]
        if options.asr_language:
            settings["asr_language"] = options.asr_language
    return settings


def predict_missing(systems: Systems, files: dict[str, Predictions], batch: list[dict]):
    """Have each system predict what its file lacks.

    Args:
        files: by system.
        batch: rows; those that are heard get their clip decoded, as `audio`, and those that `text` answers its answer,
            as `response`.

    Raises:
        ValueError, TypeError, FileNotFoundError: a clip cannot be heard, or a row does not suit the model.
    """
    missing = {system: [row for row in batch if row["id"] not in file.by_id] for system, file in files.items()}
    # Decoded once for all systems that read audio.
    heard = {row["id"]: row for system in missing if system not in READING for row in missing[system]}
    rate = systems.processor.feature_extractor.sampling_rate
    for row in heard.values():
        try:
            row["audio"] = {"array": load_audio(row["audio"], rate), "sampling_rate": rate}
        except (FileNotFoundError, TypeError, ValueError) as error:
            raise type(error)(f"Row {row['id']}: {error}") from error
    for system, rows in missing.items():
        if not rows:
            continue
        try:
            lines = systems.predict(system, rows)
        except ValueError as error:
            raise ValueError(f"{system}, rows {rows[0]['id']} to {rows[-1]['id']}: {error}") from error
        files[system].append(lines)
        if system == "text":
            for row, line in zip(rows, lines):
                # The response for the alignment scores, unless the data has one.
                row.setdefault("response", line["predicted"].get("answers"))
