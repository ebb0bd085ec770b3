"""One reader of manifests for all scripts: encodings, byte order marks, numbers in strings, lines that are none."""

import json
from pathlib import Path

import pytest
import soundfile

from examples.experiments import make_digit_manifest as digits
from examples.experiments.ablation import plan
from examples.experiments.human_speech import sentences
from processing.evaluation.rows import manifest_rows
from processing.manifests import manifest_lines, read_manifest, read_objects
from processing.response_generation.sources import ManifestSource
from processing.training_rows.loading import load_rows
from processing.training_rows.options import DataOptions
from tests.helpers.prompts import clip

EXAMPLES = Path(__file__).parent.parent / "examples"
ROW = {"audio": "a.wav", "text": "drei Äpfel", "duration": "3.2", "voice": 7, "answer": 3, "kind": None}


def test_utf_8_with_and_without_a_byte_order_mark_is_the_same(tmp_path):
    """PowerShell and Notepad write a byte order mark, and the first line was no JSON."""
    texts = [json.dumps(ROW, ensure_ascii=False) + "\r\n\r\n", json.dumps({**ROW, "text": "x"}) + "\n"]
    for name, encoding in (("plain", "utf-8"), ("marked", "utf-8-sig")):
        (tmp_path / f"{name}.jsonl").write_bytes("".join(texts).encode(encoding))
    plain, marked = (read_manifest(tmp_path / f"{name}.jsonl") for name in ("plain", "marked"))
    assert [row["text"] for row in marked] == ["drei Äpfel", "x"]
    assert [{**row, "origin": None} for row in plain] == [{**row, "origin": None} for row in marked]
    assert marked[1]["origin"].endswith("row 3"), "blank lines count, so that an editor finds the line"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_named(encoding, tmp_path):
    text = "\ufeff" * encoding.endswith("e") + json.dumps(ROW)
    (tmp_path / "m.jsonl").write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=r"m\.jsonl is UTF-(16|32), .* iconv -f UTF-(16|32) -t UTF-8"):
        read_objects(tmp_path / "m.jsonl")


def test_latin_1_is_named_with_its_line(tmp_path):
    lines = [json.dumps(ROW), json.dumps(ROW, ensure_ascii=False)]
    (tmp_path / "m.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
    with pytest.raises(ValueError, match=r"m\.jsonl, row 2: not a line of JSON in UTF-8: byte \d+ is 0xc4.*ISO-8859-1"):
        read_manifest(tmp_path / "m.jsonl")


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path):
    """str.splitlines() cut rows at U+2028 and U+0085, which JSON may hold as they are."""
    (tmp_path / "m.jsonl").write_text(json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False), encoding="utf-8")
    assert [row["text"] for _, row in read_objects(tmp_path / "m.jsonl")] == ["a\u2028b\x85c"]


def test_numbers_in_strings_are_numbers_and_labels_are_strings(tmp_path):
    """A duration of "3.2" was a TypeError in the middle of sorting; an answer 3 was never equal to the model's "3"."""
    words = [{"text": "drei", "start": "0.1", "end": 0.4}]
    (tmp_path / "m.jsonl").write_text(json.dumps({**ROW, "words": words}))
    (row,) = read_manifest(tmp_path / "m.jsonl")
    assert (row["duration"], row["voice"], row["answer"], row["kind"]) == (3.2, "7", "3", None)
    assert row["words"] == [{"text": "drei", "start": 0.1, "end": 0.4}]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("duration", "long", "expected seconds as 'duration', a number of 0 or more, got 'long'"),
        ("duration", -1, "expected seconds as 'duration'"),
        ("duration", True, "expected seconds as 'duration'"),
        ("duration", float("nan"), "expected seconds as 'duration'"),
        ("answer", ["3"], "expected a string as 'answer', got "),
        ("instruction", 3, "expected a string as 'instruction', got 3"),
        ("response", {"text": "x"}, "expected a string as 'response'"),
    ],
)
def test_fields_of_another_type_are_named(field, value, message, tmp_path):
    (tmp_path / "m.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps({**ROW, field: value}))
    with pytest.raises(ValueError, match=f"row 2: {message}"):
        read_manifest(tmp_path / "m.jsonl")


def test_all_scripts_read_a_marked_manifest_and_refuse_utf_16(tmp_path):
    """Two readers treated them differently, and six scripts had one of their own."""
    soundfile.write(tmp_path / "a.wav", clip(0.4), 16_000)
    row = {**ROW, "text": "three", "file_name": "a.wav", "speaker": "x", "seconds": "0.4", "instruction": "Repeat."}
    sentence = {**row, "text": "three apples"}
    marked, other = tmp_path / "metadata.jsonl", tmp_path / "utf16" / "metadata.jsonl"
    other.parent.mkdir()
    content = "".join(json.dumps(each) + "\n" for each in (row, sentence))
    marked.write_text(content, encoding="utf-8-sig")
    other.write_text(content, encoding="utf-16")
    readers = {
        "train.py": lambda path: load_rows(DataOptions(train_manifest=str(path)), 0)[0],
        "evaluate.py": manifest_rows,
        "make_training_data.py": lambda path: [
            ManifestSource(path).parse(line) for line in next(ManifestSource(path).blocks(8))[1]
        ],
        "make_digit_manifest.py": lambda path: digits.read_recordings(path)["x"]["three"],
        "sentences.py": lambda path: list(sentences.read_sentences(path, 9.0).values()),
        "ablate.py": plan.read_rows,
    }
    for name, read in readers.items():
        rows = read(marked)
        assert len(rows) in (1, 2), name
        with pytest.raises(ValueError, match="is UTF-16, but a manifest is UTF-8"):
            read(other)
    assert sentences.read_sentences(marked, 9.0)[tmp_path / "a.wav"]["duration"] == 0.4


def test_lines_keep_their_number_for_those_who_reject_some(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(b"\xef\xbb\xbf{}\n\nx")
    assert list(manifest_lines(tmp_path / "m.jsonl")) == [b"{}\n", b"\n", b"x"]
