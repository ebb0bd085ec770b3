"""ASR data of eight rows, and `examples/make_training_data.py` run on it in this process."""

import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import soundfile

from examples.make_training_data import main
from tests.helpers.prompts import clip

TEXTS = [
    "THE RED CAT RAN TO THE RIVER",
    "I'M SURE I CAN",
    "AND I",
    "HE HOPED THERE WOULD BE STEW",
    "RUN",
    "THE CAT AND THE RIVER AND THE CAT",
    "REPEAT THE WORDS",
    "STUFF IT INTO YOU HIS BELLY COUNSELLED HIM",
]


def write_asr(folder: Path) -> Path:
    """Write a manifest of eight good rows, `asr.jsonl`, and return its folder."""
    (folder / "clips").mkdir(parents=True)
    rows = []
    for index, text in enumerate(TEXTS):
        soundfile.write(folder / f"clips/{index}.flac", clip(0.3 + 0.05 * index, seed=index), 16_000)
        rows.append({"audio": f"clips/{index}.flac", "text": text, "id": f"84-{index}", "voice": "ann"})
    write_lines(folder / "asr.jsonl", rows)
    return folder


def write_parquet(asr: Path, folder: Path) -> Path:
    """Write two parquet files, as on the Hub, with embedded audio: the eight rows and two bad ones."""
    rows = read_lines(asr / "asr.jsonl")
    audio = [{"bytes": (asr / row["audio"]).read_bytes(), "path": row["audio"]} for row in rows]
    wav = io.BytesIO()
    soundfile.write(wav, clip(0.5, seed=9), 8_000, format="WAV")
    audio[5] = {"bytes": wav.getvalue(), "path": None}
    audio += [{"bytes": b"damaged", "path": "x.mp3"}, {"bytes": None, "path": "clips/0.flac"}]
    texts = [*TEXTS, "DAMAGED", "IN PLACE"]
    folder.mkdir()
    info = {"info": {"features": {"audio": {"_type": "Audio"}, "sentence": {"dtype": "string", "_type": "Value"}}}}
    for number, part in enumerate((slice(0, 4), slice(4, None))):
        table = pyarrow.table({"audio": audio[part], "sentence": texts[part]})
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
        pyarrow.parquet.write_table(table, folder / f"train-0000{number}-of-00002.parquet")
    return folder


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def options_for(source, result, llm, **changes):
    options = {
        **({"manifest": source} if Path(source).suffix == ".jsonl" else {"parquet": source}),
        "text_model": llm,
        "output": result,
        "normaliser": "librispeech",
        "batch_size": 2,
        "max_new_tokens": 6,
        "dtype": "float32",
        **changes,
    }
    arguments = []
    for name, value in options.items():
        if value is not None:
            arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


def make(source, output, llm, **changes):
    """Run the script in this process, and return the rows and the rejects."""
    main(options_for(source, output, llm, **changes))
    return read_lines(output), read_lines(output.with_name(f"{output.stem}.rejects.jsonl"))
