"""`examples/train.py` trains on the same batches after a resume, with workers, over processes; nothing is lost."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import TrainingArguments

from modeling_blsp_kd import BlspKdTrainer
from processing import BlspKdDataCollator, BlspKdProcessor
from processing.manifests import DEFAULT_INSTRUCTION, read_manifest
from processing.training_rows.augmentation import Augmentation
from processing.training_rows.clips import BadClipError, ClipFeatures, SkippedClips, duration_s, lengths
from processing.training_rows.data_sets import RowsInMemory, StreamedBatches, StreamedRows
from processing.training_rows.loading import training_data
from processing.training_rows.mixtures import Source, read_mixture, read_sources, stream_sources
from processing.training_rows.options import DataOptions
from tests.helpers.audio_files import encode, encode_by_ffmpeg
from tests.helpers.models import make_model
from tests.helpers.prompts import clip

EXAMPLES = Path(__file__).parents[1] / "examples"
WORDS = "the red cat ran to the river and repeat the words".split()
NUM_ROWS = 22  # so that no batch size divides it
SHORT = [0.3 + 0.05 * (5 * index % 9) for index in range(NUM_ROWS)]


def write_manifest(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_rows(folder, num_rows=NUM_ROWS, durations=SHORT):
    """Rows with clips; the last half tell no duration."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(num_rows):
        soundfile.write(folder / f"{index}.flac", clip(durations[index], seed=index), 16_000)
        row = {"audio": f"{index}.flac", "text": " ".join(WORDS[: 1 + index % 7]), "response": WORDS[index % 5]}
        rows.append(row | {"duration": durations[index]} if index < num_rows // 2 else row)
    return rows


@pytest.fixture(scope="module")
def manifests(tmp_path_factory):
    """Two manifests, the second without audio that could be decoded (for those who only read rows)."""
    folder = tmp_path_factory.mktemp("training_input")
    first = write_manifest(folder / "a" / "a.jsonl", make_rows(folder / "a"))
    described = [{"audio": f"{index}.flac", "text": "cat", "response": "cat", "duration": 1.0} for index in range(6)]
    return first, write_manifest(folder / "b" / "b.jsonl", described)


def numbers(rows):
    return [int(row["origin"].rsplit(" ", 1)[1]) for row in rows]


class RecordedCollator(BlspKdDataCollator):
    def __call__(self, rows):
        return {**super().__call__(rows), "rows": numbers(rows)}


class RecordedTrainer(BlspKdTrainer):
    """Notes batches instead of training on them."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        torch.rand(1 + self.args.process_index)  # as dropout does, differently in each process
        features = inputs["input_features"]
        self.seen.append((inputs["rows"], round(features.abs().double().sum().item(), 2)))
        self.epochs.append(int(getattr(self.train_dataset, "epoch", 0)))
        return torch.zeros(())


def batches(manifest, output, processor, streaming=False, resume=None, **options):
    """(row numbers, features) of each batch, with augmentation, of a run that leaves a checkpoint at step 9."""
    hear = ClipFeatures(processor, Augmentation([0.9, 1.0, 1.1], "white", noise_share=1.0), seed=5)
    if streaming:
        data = StreamedRows(stream_sources([Source(manifest)], 5, 7, False), hear, 5, 5, 0.01)
    else:
        rows = read_sources([Source(manifest)], 5, False)
        data = RowsInMemory(rows, lengths(rows, processor.tokenizer, 0.01), hear)
    options = {"train_sampling_strategy": "group_by_length", "max_steps": 14, "save_steps": 9, **options}
    args = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=4,
        max_grad_norm=0.0,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=5,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        **options,
    )
    trainer = RecordedTrainer(
        model=make_model(),
        args=args,
        train_dataset=data,
        data_collator=RecordedCollator(processor),
        processing_class=processor,
    )
    trainer.seen, trainer.epochs = [], []
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if not streaming and not resume:
        first, second = ([batch for (batch, _), at in zip(trainer.seen, trainer.epochs) if at == k] for k in (0, 1))
        per_epoch = -(-NUM_ROWS // (4 * args.world_size))
        assert len(first) == per_epoch and first[: len(second)] != second, "each epoch is told, and has its own order"
    return trainer.seen


@pytest.mark.parametrize(
    ("streaming", "options"),
    [
        (False, {}),
        (False, {"train_sampling_strategy": "random"}),
        (False, {"gradient_accumulation_steps": 2}),
        (True, {}),
        (True, {"gradient_accumulation_steps": 2}),
    ],
)
def test_a_resumed_run_sees_the_batches_of_the_uninterrupted_one(streaming, options, manifests, tmp_path, processor):
    """The order of later epochs came from the global generator, which dropout had moved: a run resumed in its second
    epoch trained on other batches. Here with noise and speeds, in the second or third epoch."""
    whole = batches(manifests[0], tmp_path, processor, streaming, **options)
    resumed = batches(manifests[0], tmp_path / "again", processor, streaming, tmp_path / "checkpoint-9", **options)
    accumulation = options.get("gradient_accumulation_steps", 1)
    assert len(resumed) in (len(whole) - 9 * accumulation, len(whole) - 17), "17: the second epoch's end is short"
    assert resumed == whole[len(whole) - len(resumed) :]
    assert len({str(batch) for batch in whole}) == len(whole), "no two are the same"


@pytest.mark.long
@pytest.mark.parametrize("streaming", [False, True])
def test_workers_change_nothing(streaming, manifests, tmp_path, processor):
    options = {"max_steps": 8, "save_strategy": "no"}
    alone = batches(manifests[0], tmp_path, processor, streaming, **options)
    options |= {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 1, "dataloader_persistent_workers": True}
    assert batches(manifests[0], tmp_path, processor, streaming, **options) == alone


@pytest.mark.long
def test_two_processes_share_the_rows_and_resume(manifests, tmp_path, processor):
    """Every process drew its own order from the second epoch on, so rows were lost and doubled."""
    processor.save_pretrained(tmp_path / "processor")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    run = subprocess.run(
        [*command, manifests[0], str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for streaming in ("False", "True"):
        whole, resumed = zip(*(rank[streaming] for rank in ranks))
        for seen, again in zip(whole, resumed):
            assert again == seen[9:], streaming
    # In memory 22 rows are 6 batches, 3 of each process; what fills up the last one is left out again.
    whole = [rank["False"][0] for rank in ranks]
    for start in (0, 3, 6, 9):
        rows = Counter(row for seen in whole for batch, _ in seen[start : start + 3] for row in batch)
        assert rows == Counter(range(1, NUM_ROWS + 1))
    streamed = Counter(row for rank in ranks for batch, _ in rank["True"][0] for row in batch)
    assert set(streamed.values()) <= {4, 5, 6}, "112 rows of 22, a part of 24 of them not yet used"


def test_a_stream_loses_and_doubles_no_row(manifests, processor):
    stream = stream_sources([Source(manifests[0])], 1, 5, False)
    batch_size, length_buffer = 4, 11
    data = StreamedRows(stream, ClipFeatures(processor), 1, length_buffer, 0.0)
    taken = [batch for batch, _ in zip(StreamedBatches(data, batch_size), range(2 * length_buffer))]
    counted = Counter(number for batch in taken for number in numbers(batch))
    assert counted == {number: 4 for number in range(1, NUM_ROWS + 1)}, "88 rows are four epochs"
    assert {row["epoch"] for batch in taken for row in batch} == {0, 1, 2, 3}
    assert data.num_rows == NUM_ROWS
    orders = [[row["origin"] for row in stream] for epoch in (0, 1, 0) if stream.set_epoch(epoch) is None]
    assert orders[0] == orders[2] != orders[1], "shuffled anew each epoch"


def test_streamed_batches_are_of_similar_length(processor, tmp_path):
    described = [
        {"audio": "none.flac", "text": "cat", "response": "cat", "duration": 1.0 + 37 * index % 50}
        for index in range(64)
    ]
    stream = stream_sources([Source(write_manifest(tmp_path / "m.jsonl", described))], 1, 64, False)

    def padded(length_buffer):
        data = StreamedRows(stream, ClipFeatures(processor), 1, length_buffer, 0.0)
        taken = [batch for batch, _ in zip(StreamedBatches(data, 4), range(16))]
        return sum(4 * max(row["duration"] for row in batch) for batch in taken)

    assert padded(16) < 1.1 * sum(row["duration"] for row in described) < 0.8 * padded(1)


def test_lengths_count_audio_and_tokens_and_open_no_file_of_known_duration(processor):
    rows = [
        {"audio": "nowhere.flac", "duration": 2.0, "text": "cat", "instruction": "", "response": "cat"},
        {"audio": "nowhere.flac", "duration": 2.0, "text": "cat", "instruction": "", "response": "cat " * 50},
        {"audio": None, "text": "cat", "instruction": "", "response": "cat"},
    ]
    assert lengths(rows, processor.tokenizer, 0.0) == [2.0, 2.0, 0.0]
    short, long, silent = lengths(rows, processor.tokenizer, 0.1)
    assert long > short + 4 and short - silent == pytest.approx(2.0) and silent > 0
    with pytest.raises(BadClipError, match=r"m, row 3 \(audio 'nowhere.flac'"):
        lengths([{**rows[0], "duration": None, "origin": "m, row 3"}], processor.tokenizer, 0.0)


def test_only_an_explicit_null_makes_a_row_of_text_alone(tmp_path):
    """A misspelt field made one, without a word."""
    row = {"audio": None, "text": "x"}
    assert read_manifest(write_manifest(tmp_path / "m.jsonl", [row]), allow_text_only=True)[0]["audio"] is None
    with pytest.raises(ValueError, match="row 1: expected 'audio' and 'text'"):
        read_manifest(write_manifest(tmp_path / "m.jsonl", [row]))
    with pytest.raises(ValueError, match=r"""row 1: expected 'audio' and 'text' .*says "audio": null.*'audios'"""):
        read_manifest(write_manifest(tmp_path / "m.jsonl", [{"audios": "a.wav", "text": "x"}]), allow_text_only=True)


def test_an_empty_instruction_stays_empty_and_only_a_missing_one_becomes_the_default(tmp_path):
    """It became the default one, so that nobody could train on speech that is the whole prompt."""
    rows = [{"audio": "a.wav", "text": "x", "instruction": given} for given in ("", None, "Repeat.")]
    rows.append({"audio": "a.wav", "text": "2020-01-01"})
    read = read_manifest(write_manifest(tmp_path / "m.jsonl", rows))
    assert [row["instruction"] for row in read] == ["", DEFAULT_INSTRUCTION, "Repeat.", DEFAULT_INSTRUCTION]
    assert read[3]["text"] == "2020-01-01", "what looks like a date is text"
    assert read[0]["audio"] == str(tmp_path / "a.wav")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"row 2: not a line of JSON"),
        ("[1]", r"row 2: expected a JSON object"),
        ('{"text": "x"}', r"row 2: expected 'audio' and 'text'"),
        ('{"audio": "a.wav", "text": " "}', r"row 2: expected 'audio' and 'text'"),
        ('{"audio": "../a.wav", "text": "x"}', r"row 2: the audio path '../a.wav' leaves .* --allow_outside_paths"),
        ('{"audio": 5, "text": "x"}', r"row 2: expected the path of an audio file, got 5"),
        (r'{"audio": "\ud800.wav", "text": "x"}', r"row 2: expected the path .* which no file can be called"),
    ],
)
def test_a_bad_line_of_a_manifest_is_named(line, message, tmp_path):
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"audio": "a.wav", "text": "x"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_manifest(str(manifest))


def test_outside_paths_and_rows_of_text_are_read_where_they_are_allowed(tmp_path):
    rows = [{"audio": "../a.wav", "text": "x"}, {"audio": None, "text": "y"}]
    read = read_manifest(write_manifest(tmp_path / "m" / "m.jsonl", rows), True, True)
    assert Path(read[0]["audio"]).resolve() == tmp_path / "a.wav" and read[1]["audio"] is None


@pytest.mark.parametrize("streaming", [False, True])
def test_mixtures_keep_their_weights_and_lose_no_row(streaming, manifests, tmp_path):
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(f"- {{manifest: {manifests[0]}}}\n- {{manifest: {manifests[1]}, weight: 3}}\n")
    sources = read_mixture(str(mixture))

    def read(seed):
        rows = stream_sources(sources, seed, 10, False) if streaming else read_sources(sources, seed, False)
        return [row["origin"] for row in rows]

    origins = read(1)
    assert origins == read(1) != read(2)
    assert len(set(origins)) == NUM_ROWS + 6, "an epoch ends when both have been read to the end"
    share = sum("b.jsonl" in origin for origin in origins) / len(origins)
    assert 0.6 < share < 0.88, "0.75 expected of some 90"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{manifest: a}", "expected a list of sources"),
        ("[{manifest: a, share: 2}]", r"source 1 .* unexpected keyword argument 'share'"),
        ("[{manifest: a}, {manifest: b, weight: 0}]", r"source 2 .* expected a weight above 0, got 0"),
        ("[{manifest: a, dataset: b}]", "expected either 'manifest' or 'dataset'"),
    ],
)
def test_a_mixture_that_is_not_understood_is_named(text, message, tmp_path):
    (tmp_path / "mixture.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_mixture(str(tmp_path / "mixture.yaml"))


@pytest.mark.long
def test_a_data_set_with_embedded_audio_is_streamed(manifests, tmp_path, processor):
    import pyarrow
    import pyarrow.parquet

    read = read_manifest(manifests[0])[:3]
    embedded = [{"bytes": Path(row["audio"]).read_bytes(), "path": None} for row in read] + [None]
    table = pyarrow.table(
        {
            "audio": pyarrow.array(embedded),
            "text": [row["text"] for row in read] + ["cat"],
            "response": [row["response"] for row in read] + ["cat"],
            "speaker": ["ann"] * 4,
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "train-0.parquet")
    source = Source(dataset=str(tmp_path))
    rows = sorted(stream_sources([source], 0, 10, False), key=lambda row: row["origin"])
    hear = ClipFeatures(processor)
    expected = hear([{**row, "epoch": 0} for row in read])
    *heard, text_only = hear([{**row, "epoch": 0} for row in rows])
    for ours, theirs in zip(heard, expected):
        assert ours["text"] == theirs["text"] and np.array_equal(ours["input_features"], theirs["input_features"])
    assert "input_features" not in text_only and text_only["audio"] is None
    assert lengths(rows, processor.tokenizer, 0.0) == pytest.approx([*SHORT[:3], 0.0], abs=1e-3)
    both = stream_sources([source, Source(manifests[0])], 0, 10, False)
    assert len({row["origin"] for row in both}) == NUM_ROWS + 4
    with pytest.raises(ValueError, match="add --streaming"):
        read_sources([source], 0, False)


def test_a_streamed_row_without_a_response_is_named(tmp_path):
    manifest = write_manifest(tmp_path / "m.jsonl", [{"audio": "a.wav", "text": "x"}])
    with pytest.raises(ValueError, match=r"row 1: streamed rows need a 'response'.*make_training_data"):
        list(stream_sources([Source(manifest)], 0, 10, False))


def test_augmentation_depends_on_row_and_epoch_alone(manifests, processor):
    rows = read_manifest(manifests[0])[:3]
    hear = ClipFeatures(processor, Augmentation([0.8, 1.0, 1.2], "white", noise_share=0.7), seed=1)

    def heard(rows, epoch):
        return [row["input_features"] for row in hear([{**row, "epoch": epoch} for row in rows])]

    together, reverse = heard(rows, 3), heard(rows[::-1], 3)[::-1]
    assert all(np.array_equal(one, other) for one, other in zip(together, reverse))
    later = heard(rows, 4)
    assert any(one.shape != other.shape or not np.array_equal(one, other) for one, other in zip(together, later))


def test_without_augmentation_features_are_those_of_the_processor(manifests, processor):
    rows = read_manifest(manifests[0])[:2]
    for keep in (False, True):
        hear = ClipFeatures(processor, Augmentation(), keep=keep)
        for _ in range(2):
            for row, heard in zip(rows, hear([{**row, "epoch": 0} for row in rows])):
                expected = processor.extract_features([row["audio"]])["input_features"][0]
                assert np.array_equal(heard["input_features"], expected)


def test_kept_features_of_embedded_clips_are_their_own(processor):
    """Clips without a name were kept under the number of their bytes, and of two that had as many the second got the
    features of the first."""
    clips = [encode(clip(0.5, seed=seed), subtype="PCM_16") for seed in range(2)]
    rows = [
        {"audio": {"bytes": contents, "path": path}, "text": "a", "epoch": 0}
        for contents, path in [(clips[0], None), (clips[1], None), (clips[0], "a.wav"), (clips[1], "a.wav")]
    ]
    hear = ClipFeatures(processor, keep=True)
    for _ in range(2):
        for row, heard in zip(rows, hear(rows)):
            expected = processor.extract_features([row["audio"]["bytes"]])["input_features"][0]
            assert np.array_equal(heard["input_features"], expected)


@pytest.mark.parametrize("container, codec, rate", [("ipod", "aac", 16_000), ("webm", "libopus", 48_000)])
def test_files_of_phones_and_browsers_are_trained_on(container, codec, rate, processor, tmp_path):
    """Their lengths were asked of libsndfile alone, which does not know them."""
    contents = encode_by_ffmpeg(clip(0.5), container, codec, coded_rate=rate)
    (tmp_path / "clip.bin").write_bytes(contents)
    row = {"text": "a", "instruction": "b", "response": "c", "epoch": 0}
    for audio in (str(tmp_path / "clip.bin"), {"bytes": contents, "path": None}):
        assert duration_s({**row, "audio": audio}) == pytest.approx(0.5, abs=0.05)
        [heard] = ClipFeatures(processor)([{**row, "audio": audio}])
        assert np.array_equal(heard["input_features"], processor.extract_features([contents])["input_features"][0])


def test_a_missing_clip_is_said_to_be_missing(tmp_path):
    """libsndfile's word for it is "System error."."""
    row = {"audio": str(tmp_path / "none.wav"), "text": "a"}
    with pytest.raises(BadClipError, match="Audio file not found: '.*none.wav'"):
        duration_s(row)


def test_speed_shortens_and_raises_the_pitch(tmp_path):
    tone = np.sin(2 * np.pi * 400 * np.arange(16_000) / 16_000).astype(np.float32)
    faster = Augmentation([1.25])(tone, 16_000, np.random.default_rng(0))
    assert faster.dtype == np.float32 and len(faster) == 12_800
    assert np.abs(np.fft.rfft(faster)).argmax() * 16_000 / len(faster) == pytest.approx(500, abs=2)


@pytest.mark.parametrize("kind", ["white", "folder"])
def test_noise_has_the_ratio_that_was_asked_for(kind, tmp_path):
    soundfile.write(tmp_path / "hum.wav", clip(0.2, seed=1, rate=8000), 8000)
    soundfile.write(tmp_path / "rain.flac", clip(3.0, seed=2), 16_000)
    augment = Augmentation(
        noise="white" if kind == "white" else str(tmp_path), noise_snr_db=[10.0, 10.0], noise_share=1.0
    )
    speech = clip(1.0, seed=3)
    heard = [augment(speech, 16_000, np.random.default_rng(seed)) for seed in range(4)]
    for noisy in heard:
        assert noisy.shape == speech.shape and noisy.dtype == np.float32
        ratio_db = 10 * np.log10(np.mean(speech**2) / np.mean((noisy - speech) ** 2))
        assert ratio_db == pytest.approx(10, abs=0.05)
    assert not np.array_equal(heard[0], heard[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speeds": [0.1]}, "--speeds must be between 0.5 and 2"),
        ({"noise_snr_db": [20.0, 5.0]}, "--noise_snr_db takes the lowest and the highest"),
        ({"noise_share": 2.0}, "--noise_share must be from 0 to 1"),
        ({"noise": "nowhere"}, "a folder of audio files, and 'nowhere' has none"),
    ],
)
def test_augmentation_out_of_range_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_manifest": "a", "train_mixture": "b"}, "not both"),
        ({"streaming": True}, "--streaming is for"),
        ({"length_buffer": 0}, "must be at least 1"),
        ({"seconds_per_token": -1.0}, "must be 0 or more"),
    ],
)
def test_options_that_exclude_each_other_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DataOptions(**options)


@pytest.fixture
def damaged(tmp_path):
    """A manifest whose rows 2 and 5 are bad: a file that is no audio, and one that breaks off."""
    rows = make_rows(tmp_path / "data", 8, [2.0] * 8)
    (tmp_path / "data" / "1.flac").write_bytes(b"no audio")
    whole = (tmp_path / "data" / "4.flac").read_bytes()
    (tmp_path / "data" / "4.flac").write_bytes(whole[: len(whole) // 2])
    for row in rows:
        row.pop("duration", None)
    return write_manifest(tmp_path / "data" / "m.jsonl", rows)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_clip_is_an_error_that_names_row_and_file(num_workers, damaged, processor):
    rows = read_manifest(damaged)[4:5]
    data = RowsInMemory(rows, [1.0], ClipFeatures(processor))
    loader = torch.utils.data.DataLoader(data, collate_fn=BlspKdDataCollator(processor), num_workers=num_workers)
    with pytest.raises(BadClipError, match=r"m\.jsonl, row 5 \(audio '.*4\.flac', text 'the red.*--skip_bad_audio"):
        next(iter(loader))


def test_skipped_clips_are_counted_and_listed_once(damaged, processor, tmp_path):
    rows = [{**row, "epoch": 0} for row in read_manifest(damaged)]
    skipped = SkippedClips(tmp_path / "out" / "skipped.jsonl")
    assert skipped.finish() == 0
    hear = ClipFeatures(processor, skipped=skipped)
    for _ in range(3):
        assert numbers(hear(rows)) == [1, 3, 4, 6, 7, 8]
    assert skipped.finish() == 2
    listed = [json.loads(line) for line in skipped.path.read_text().splitlines()]
    assert [row["origin"].rsplit(" ", 1)[1] for row in listed] == ["2", "5"]
    assert "no audio" not in listed[0]["reason"] and "1.flac" in listed[0]["reason"]
    with pytest.raises(BadClipError, match=r"No clip of a batch of 1 .* larger batches"):
        hear(rows[4:5])


def test_rows_in_memory_leave_bad_clips_out(damaged, processor, tmp_path):
    args, rows = TrainingArguments(str(tmp_path)), read_manifest(damaged)
    data = training_data(rows, DataOptions(train_manifest=damaged, skip_bad_audio=True), args, processor)
    assert len(data) == len(data.lengths) == 7, "a file that is no audio is known by its header"
    assert numbers(data.__getitems__(range(7))) == [1, 3, 4, 6, 7, 8]
    assert data.clip_features.skipped.finish() == 2
    with pytest.raises(BadClipError, match="row 2"):
        training_data(rows, DataOptions(train_manifest=damaged), args, processor)


@pytest.mark.long
def test_train_goes_on_without_bad_clips_and_tells_their_number(damaged, tmp_path):
    command = [sys.executable, EXAMPLES / "train.py", "--train_manifest", damaged, "--output_dir", tmp_path / "model"]
    command += ["--max_steps", "3", "--per_device_train_batch_size", "4", "--use_cpu", "true", "--disable_tqdm", "true"]
    command += [
        "--skip_bad_audio",
        "true",
        "--save_strategy",
        "no",
        "--dataloader_num_workers",
        "1",
        "--streaming",
        "true",
    ]
    command += ["--length_buffer", "1", "--shuffle_buffer", "1"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "2 training rows with bad audio were skipped" in run.stdout
    results = json.loads((tmp_path / "model" / "results.json").read_text())
    assert results["skipped_rows"] == 2
    assert len((tmp_path / "model" / "skipped_audio.jsonl").read_text().splitlines()) == 2


def main(manifest, folder):
    """One of two processes: runs and resumes, in memory and streamed."""
    processor = BlspKdProcessor.from_pretrained(Path(folder) / "processor")
    seen = {}
    for streaming in (False, True):
        output = Path(folder) / str(streaming)
        whole = batches(manifest, output, processor, streaming)
        again = batches(manifest, output / "again", processor, streaming, output / "checkpoint-9")
        seen[str(streaming)] = whole, again
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
