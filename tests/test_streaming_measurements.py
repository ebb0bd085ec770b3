"""The commands that measure streaming models run, and say what they are asked. Their figures are not judged here."""

import json
import sys

import pytest
import torch
from transformers import HfArgumentParser

from examples.experiments import measure_streaming
from modeling_blsp_kd.training.options import TINY_WORLD, Arguments, ModelOptions
from processing.training_rows.options import DataOptions
from tests.benchmarks import listening
from tests.helpers.audio_files import encode
from tests.helpers.prompts import clip
from tests.test_speech_session import listener, streaming_model  # noqa: F401 (a fixture)


@pytest.mark.long
def test_the_benchmark_of_sessions_reports_every_llm_and_length(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda num_threads: None)  # other tests follow in this process
    monkeypatch.setattr(sys, "argv", ["listening", "--small", "--clock", "cpu", "--output", str(tmp_path)])
    listening.main()
    [result] = json.loads((tmp_path / "listening.json").read_text())["results"]
    assert [row["num_clips"] for row in result["rows"].values()] == [3, 3]
    for measured in result["clips"]:
        assert 0 < measured["cached_share"] < 1 and measured["first_token_s"] > 0 and measured["chunk_s"] > 0
    assert (tmp_path / "listening.md").read_text().count("\n| tiny LLM") == 2


@pytest.mark.parametrize("shift_s, slope", [(0.0, 0.0), (0.002, 0.002)])
def test_the_slope_is_what_a_second_of_speech_adds(shift_s, slope):
    clips = [{"duration_s": s, "first_token_s": 0.1 + shift_s * s + 0.001 * (-1) ** s} for s in range(100)]
    found = listening.slope(clips)
    assert abs(found["s_per_s"] - slope) < 3 * found["standard_error"] < 1e-4


@pytest.mark.long
def test_each_chunk_is_measured_beside_whole_clips(tmp_path, monkeypatch, listener):  # noqa: F811
    rows = [
        {"audio": f"{n}.wav", "text": "the red cat", "answer": "cat", "instruction": "Repeat.", "voice": f"v{n}"}
        for n in range(3)
    ]
    for n, row in enumerate(rows):
        (tmp_path / row["audio"]).write_bytes(encode(clip(0.8 + 0.3 * n)))
    for name, some in (("test-3", rows), ("train-1", rows[:1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))

    def train(seed, options, for_training):
        assert for_training == ["--max_steps", "7"]
        streaming_model().save_pretrained(tmp_path / "model")
        listener.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    monkeypatch.setattr(measure_streaming, "train", train)
    command = ["measure_streaming", "--seeds", "1", "2", "--output", str(tmp_path), "--cache_dir", str(tmp_path)]
    command += [
        "--num_utterances",
        "1",
        "--num_eval_utterances",
        "3",
        "--chunks_ms",
        "160",
        "0",
        "--silences_ms",
        "300",
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--max_steps", "7"])
    measure_streaming.main()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["num_rows"] == 3 and list(results["seeds"]) == ["1", "2"]
    for found in results["seeds"].values():
        assert list(found["by_chunk"]) == ["160 ms", "full context"] and list(found["end_of_speech"]) == ["300"]
        assert all(0 <= each["exact_token_count"] <= 1 for each in found["by_chunk"].values())
    assert (tmp_path / "results.md").read_text().count("\n| streaming, ") == 2


@pytest.mark.parametrize("given, start_from", [([], [str(TINY_WORLD / "model")]), (["--start_from", ""], [])])
def test_training_begins_with_the_shipped_model_or_anew(monkeypatch, tmp_path, given, start_from):
    commands = []

    def run(command, **_):
        commands.append(command)
        raise KeyboardInterrupt

    monkeypatch.setattr(measure_streaming.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["measure_streaming", "--output", str(tmp_path), *given])
    with pytest.raises(KeyboardInterrupt):
        measure_streaming.main()
    [[_, _, *words]] = commands
    options, _, _ = HfArgumentParser((ModelOptions, DataOptions, Arguments)).parse_args_into_dataclasses(words)
    assert [path for path in [options.start_from] if path] == start_from
    assert json.loads(options.speech_streaming) == {"chunk_ms": 640}
