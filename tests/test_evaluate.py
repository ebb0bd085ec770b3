"""The evaluation harness: rows of many data sets, four systems, predictions that go on, scores with intervals."""

import argparse
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from examples.evaluate import TINY_WORLD_TRANSLATION, main, tiny_world
from examples.tiny_world.world import INSTRUCTIONS
from modeling_blsp_kd.speech_encoder import TrueLengthWhisperEncoder
from processing.audio_loading import load_audio
from processing.evaluation.answering import answer_rows
from processing.evaluation.predictions import Predictions
from processing.evaluation.recognition import load_recognizer, name_cascades, transcribe
from processing.evaluation.report import as_markdown, plot
from processing.evaluation.rows import check_rows, hub_rows, manifest_rows, open_rows, schema_of
from processing.evaluation.scoring import Scorer
from processing.evaluation.systems import TASKS, Systems
from processing.evaluation.word_times import errors_of
from tests.helpers.audio_files import StandInDecoder
from tests.helpers.models import VOCAB_SIZE, make_model, speech_config
from tests.helpers.prompts import SAMPLING_RATE, clip

EXAMPLES = Path(__file__).parent.parent / "examples"
TEXTS = ["the red cat", "ran to the river and back", "cat"]


def flac(seed=0, duration_s=0.6) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, clip(duration_s, seed=seed), SAMPLING_RATE, format="FLAC")
    return file.getvalue()


@pytest.fixture
def spoken_rows():
    return [
        {
            "id": name,
            "audio": {"array": clip(0.5 + 0.4 * index, seed=index), "sampling_rate": SAMPLING_RATE},
            "text": text,
            "instruction": "repeat the words",
            "answer": text.split()[0],
            "translation": "el gato rojo",
        }
        for index, (name, text) in enumerate(zip("abc", TEXTS))
    ]


@pytest.fixture(scope="module")
def model():
    return make_model(plora={"lora_dropout": 0.0})


def make_systems(model, processor, **options):
    return Systems(model, processor, translation_instruction="in spanish", max_new_tokens=6, **options)


# -- rows -------------------------------------------------------------------------------------------------------------

COVOST = {"client_id": "f00", "file": "a.mp3", "sentence": "The cat.", "translation": "Die Katze.", "id": "cv_1"}
COMMON_VOICE = {
    "client_id": "f00", "path": "en/a.mp3", "sentence": "The cat.", "up_votes": 2, "down_votes": 0, "age": "",
    "gender": "", "accent": "Scottish English", "locale": "en", "segment": "", "variant": "",
}  # fmt: skip
LIBRISPEECH = {"file": "1.flac", "text": "THE CAT", "speaker_id": 84, "chapter_id": 121123, "id": "84-121123-0000"}
CONTINUE = "Continue the following text."
DATA_SETS = {
    "covost2": (COVOST, dict(id="cv_1", text="The cat.", translation="Die Katze.", voice="f00", instruction=CONTINUE)),
    "common_voice": (
        COMMON_VOICE,
        dict(id="en/a.mp3", text="The cat.", voice="f00", instruction=CONTINUE),
    ),
    "librispeech": (LIBRISPEECH, dict(id="84-121123-0000", text="the cat", voice="84", instruction=CONTINUE)),
    "voicebench_sd_qa": (
        {"prompt": "Who wrote it?", "reference": "Ann"},
        dict(id="1", text="Who wrote it?", answer="Ann"),
    ),
    "voicebench_alpacaeval": ({"prompt": "Who wrote it?", "output": "Ann."}, dict(id="1", text="Who wrote it?")),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", DATA_SETS)
def test_rows_of_known_data_sets(tmp_path, name, streaming):
    """MuST-C's loader has CoVoST-2's columns."""
    theirs, ours = DATA_SETS[name]
    audio = {"bytes": flac(), "path": "a.flac"}
    Dataset.from_list([{"audio": audio, **theirs}]).to_parquet(tmp_path / "data" / "test-00000.parquet")
    (row,) = check_rows(hub_rows(str(tmp_path / "data"), None, "test", streaming))
    heard = load_audio(row.pop("audio"), SAMPLING_RATE)
    assert row == ours
    np.testing.assert_allclose(heard, clip(0.6), atol=1e-4)


def test_unknown_columns_are_told_with_those_that_are_known():
    with pytest.raises(ValueError, match=r"columns \['audio', 'words'\] fit none that are known .*LibriSpeech: audio"):
        schema_of(["words", "audio"])
    with pytest.raises(ValueError, match="needs a --split"):
        hub_rows("org/name", None, None, False)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"audio": "a.wav", "text": "a"}, {"audio": None, "text": "b", "id": 7}], r"Row 2 \(id 7\) needs .* no audio"),
        ([{"audio": "a.wav", "text": " "}], r"Row 1 \(id 1\) needs 'audio' and a non-empty 'text', got audio and"),
        ([{"audio": "a.wav", "text": "a", "id": "x"}] * 2, r"Row 2 has the id 'x' of an earlier row"),
    ],
)
def test_bad_rows_are_named(rows, message):
    with pytest.raises(ValueError, match=message):
        list(check_rows(rows))


def options_of(**given):
    defaults = dict(manifest=None, train_manifest=None, dataset=None, config=None, split=None, streaming=False)
    defaults["allow_outside_paths"] = False
    return argparse.Namespace(**{**defaults, "limit": None, **given})


def write_manifest(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_manifest_is_named_by_its_contents_and_voices_by_the_training(tmp_path):
    rows = [{"audio": f"{voice}.wav", "text": "the cat", "voice": voice} for voice in "abc"]
    train = write_manifest(tmp_path / "train.jsonl", rows[:2])
    test = write_manifest(tmp_path / "test.jsonl", rows)
    groups = [row["voice_group"] for row in manifest_rows(test, train)]
    assert groups == ["seen voices", "seen voices", "held out voices"]
    name, total, opened = open_rows(options_of(manifest=test, limit=2))
    assert total == 2 and [row["id"] for row in opened] == ["1", "2"]
    write_manifest(tmp_path / "test.jsonl", rows[::-1])
    assert open_rows(options_of(manifest=test))[0] != name


@pytest.mark.parametrize(
    "given",
    [dict(manifest="a", dataset="b"), dict(dataset="b", train_manifest="c"), dict(manifest="a", streaming=True)],
)
def test_options_of_other_data_are_refused(given):
    with pytest.raises(ValueError, match="not both|there is none"):
        open_rows(options_of(**given))


def test_rows_of_some_kinds_and_another_instruction(tmp_path):
    rows = [{"audio": "a.wav", "text": text, "kind": kind, "answer": "x"} for text, kind in zip(TEXTS, "aba")]
    manifest = write_manifest(tmp_path / "rows.jsonl", rows)
    whole, _, _ = open_rows(options_of(manifest=manifest))
    name, total, opened = open_rows(options_of(manifest=manifest, kinds=["a"], limit=5))
    assert (total, [row["text"] for row in opened]) == (2, [TEXTS[0], TEXTS[2]]) and name != whole
    name, _, opened = open_rows(options_of(manifest=manifest, instruction="Go on."))
    assert name != whole and all(row["instruction"] == "Go on." and "answer" not in row for row in opened)
    with pytest.raises(ValueError, match="No row is of the kind c. There are: a, b"):
        open_rows(options_of(manifest=manifest, kinds=["a", "c"]))


def test_without_data_there_is_what_the_caller_takes_then():
    rows = [{"audio": "a.wav", "text": text} for text in TEXTS]
    name, total, opened = open_rows(options_of(limit=2), lambda options: (f"own, {options.limit}", rows))
    assert (name, total, [row["text"] for row in opened]) == ("own, 2", 2, TEXTS[:2])
    with pytest.raises(ValueError, match="There is no data to evaluate on. Give --manifest or --dataset"):
        open_rows(options_of())


# -- predictions on disk ----------------------------------------------------------------------------------------------


def test_predictions_go_on_after_the_last_whole_line(tmp_path):
    first = Predictions(tmp_path, "text", {"model": "m"})
    first.append([{"id": "1", "predicted": {"answers": "año"}}, {"id": "2", "predicted": {}}])
    with first.path.open("a") as file:
        file.write('{"id": "3", "pred')  # killed while writing
    second = Predictions(tmp_path, "text", {"model": "m"})
    assert list(second.by_id) == ["1", "2"] and second.by_id["1"]["predicted"]["answers"] == "año"
    second.append([{"id": "3", "predicted": {}}])
    assert list(Predictions(tmp_path, "text", {"model": "m"}).by_id) == ["1", "2", "3"]


def test_predictions_of_other_settings_are_not_continued(tmp_path):
    Predictions(tmp_path, "text", {"model": "m", "data": "d"}).append([{"id": "1"}])
    message = r"text\.jsonl was predicted with other settings \(model: 'm' then, 'n' now\)\. Give another --output"
    with pytest.raises(ValueError, match=message):
        Predictions(tmp_path, "text", {"model": "n", "data": "d"})
    (tmp_path / "text.settings.json").unlink()
    with pytest.raises(ValueError, match="None then"):
        Predictions(tmp_path, "text", {"model": "m", "data": "d"})


# -- systems ----------------------------------------------------------------------------------------------------------


def test_text_and_speech_are_what_answer_rows_gives(model, processor, spoken_rows):
    systems = make_systems(model, processor, tasks=("answers",))
    for system, source in (("text", "text"), ("speech", "audio")):
        expected = answer_rows(model, processor, spoken_rows, source, max_new_tokens=6, description=None)
        lines = systems.predict(system, spoken_rows)
        assert [line["predicted"] for line in lines] == [{"answers": text} for text in expected]
        assert [line["id"] for line in lines] == ["a", "b", "c"] and "audio" not in lines[0]


def test_each_task_asks_its_own_question(model, processor, spoken_rows):
    lines = make_systems(model, processor).predict("text", spoken_rows)
    for task, instruction in (("transcripts", processor.transcription_instruction), ("translation", "in spanish")):
        rows = [{**row, "instruction": instruction} for row in spoken_rows]
        expected = answer_rows(model, processor, rows, "text", max_new_tokens=6, description=None)
        assert [line["predicted"][task] for line in lines] == expected
    (line,) = make_systems(model, processor).predict("text", [{"id": "x", "text": "the cat", "audio": None}])
    assert set(line["predicted"]) == {"transcripts"}, "it has neither an answer nor a translation to compare with"


def test_blind_sees_the_instruction_only(model, processor, spoken_rows):
    systems = make_systems(model, processor, tasks=("answers",))
    other = [{**row, "text": "river", "audio": None} for row in spoken_rows]
    blind = [line["predicted"] for line in systems.predict("blind", other)]
    assert blind == [line["predicted"] for line in systems.predict("blind", spoken_rows)]
    assert blind[0] == blind[1] == blind[2]
    text = [line["predicted"] for line in systems.predict("text", spoken_rows)]
    assert blind != text


def test_a_cascade_that_hears_all_is_the_text_system(model, processor, spoken_rows):
    told = {len(row["audio"]["array"]): row["text"] for row in spoken_rows}
    systems = make_systems(model, processor, recognizer=lambda clips: [told[len(each["array"])] for each in clips])
    text, cascade = (systems.predict(system, spoken_rows) for system in ("text", "cascade"))
    for row, of_text, of_cascade in zip(spoken_rows, text, cascade):
        assert of_cascade["predicted"].pop("transcripts") == row["text"]
        of_text["predicted"].pop("transcripts")
        assert of_cascade == of_text


def test_several_cascades_are_systems_of_their_own(model, processor, spoken_rows):
    assert name_cascades(["org/base"]) == {"cascade": "org/base"}
    named = name_cascades(["org/base", "here/tiny.en"])
    assert named == {"cascade_base": "org/base", "cascade_tiny.en": "here/tiny.en"}
    with pytest.raises(ValueError, match="org/base, my/base need different last parts"):
        name_cascades(["org/base", "my/base"])
    heard = {name: lambda clips, word=name[-1]: [word] * len(clips) for name in named}
    systems = make_systems(model, processor, recognizer=heard)
    for name in named:
        assert [line["predicted"]["transcripts"] for line in systems.predict(name, spoken_rows)] == [name[-1]] * 3


def test_a_translation_needs_an_instruction(model, processor, spoken_rows):
    with pytest.raises(ValueError, match="Row a has a translation to compare with. Tell what to ask for"):
        Systems(model, processor).predict("text", spoken_rows)


def test_alignment_by_row_adds_up_to_that_of_the_batch(model, processor, collator, spoken_rows):
    rows = [{**row, "response": f"{row['text']} ran"} for row in spoken_rows]
    lines = make_systems(model, processor, tasks=("alignment",)).predict("speech", rows)
    with torch.no_grad():
        whole = model(**collator(rows)).loss_parts
    names = ("response_kl", "response_agreement", "input_kl", "token_count_error", "token_count_accuracy")
    for name in names:
        summed = np.sum([line["alignment"][name] for line in lines], axis=0)
        np.testing.assert_allclose(summed, whole[name].numpy(), rtol=1e-4)


def test_alignment_takes_the_llms_own_answers_where_the_data_has_none(model, processor, spoken_rows):
    systems = make_systems(model, processor, tasks=("alignment",))
    own = answer_rows(model, processor, spoken_rows, "text", max_new_tokens=6, description=None)
    expected = systems.predict("speech", [{**row, "response": text} for row, text in zip(spoken_rows, own)])
    assert systems.predict("speech", spoken_rows) == expected


def test_word_times_of_rows_that_know_their_words(model, processor, spoken_rows):
    spoken_rows[1]["words"] = [{"text": word, "start": 0.1, "end": 0.2} for word in spoken_rows[1]["text"].split()]
    lines = make_systems(model, processor, tasks=("alignment",)).predict("speech", spoken_rows)
    assert [line.get("num_words") for line in lines] == [None, 6, None]
    assert "word_errors_s" in lines[1]


# -- recognition ------------------------------------------------------------------------------------------------------


def test_a_recogniser_is_read_off_its_speech_vectors(processor):
    recogniser = make_model(distillation={"transcript_ce": 1.0, "response_kl": 0.0, "input_kl": 0.0})
    clips = [clip(0.7, seed=1), clip(1.2, seed=2)]
    expected = []
    for each in clips:
        features = {name: torch.from_numpy(values) for name, values in processor.extract_features([each]).items()}
        with torch.no_grad():
            vectors = recogniser.get_audio_features(**features).pooler_output[0]
        embeddings = recogniser.get_input_embeddings().weight
        ids = [max(range(VOCAB_SIZE), key=lambda token: float(vector @ embeddings[token])) for vector in vectors]
        expected.append(processor.tokenizer.decode(ids, skip_special_tokens=True).strip())
    assert transcribe(recogniser, processor, clips) == expected and any(expected)


def test_decoders_of_datasets_are_heard_as_the_clips_that_they_hold(model, processor):
    """Whoever gives rows of `datasets` to these functions has torchcodec's decoders in them."""
    clips = [(clip(0.7, seed=1), SAMPLING_RATE), (clip(1.2, seed=2), SAMPLING_RATE)]
    decoders = [StandInDecoder(samples) for samples, _ in clips]
    recogniser = make_model(distillation={"transcript_ce": 1.0, "response_kl": 0.0, "input_kl": 0.0})
    for each in (recogniser, model):
        assert transcribe(each, processor, decoders, 4) == transcribe(each, processor, clips, 4)
    rows = [{"audio": decoder, "text": "the cat"} for decoder in decoders]
    expected = [{"audio": samples, "text": "the cat"} for samples in clips]
    assert [row["audio"] for row in check_rows(rows)] == decoders
    heard, read = (answer_rows(model, processor, each, "audio", max_new_tokens=4) for each in (rows, expected))
    assert heard == read


def test_any_other_model_is_asked_to_repeat(model, processor, spoken_rows):
    rows = [{**row, "instruction": processor.transcription_instruction} for row in spoken_rows]
    expected = answer_rows(model, processor, rows, "audio", max_new_tokens=6, description=None)
    assert transcribe(model, processor, [row["audio"] for row in rows], max_new_tokens=6) == expected


def test_a_recogniser_of_transformers_hears_each_clip_alone(tmp_path):
    """transformers' pipeline gave a CTC model's transcript of the shorter clip letters from its padding."""
    vocabulary = {"<pad>": 0, "|": 1, **{letter: 2 + index for index, letter in enumerate("abcdefgh")}}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = Wav2Vec2CTCTokenizer(tmp_path / "vocab.json", pad_token="<pad>", unk_token="<pad>")
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(return_attention_mask=True), tokenizer).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=10, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8, 8), conv_kernel=(10, 8), conv_stride=(160, 2), num_feat_extract_layers=2, pad_token_id=0,
        feat_extract_norm="layer", num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    Wav2Vec2ForCTC(config).save_pretrained(tmp_path)
    recognise = load_recognizer(str(tmp_path))
    clips = [{"array": clip(0.5), "sampling_rate": SAMPLING_RATE}, {"bytes": flac(seed=1, duration_s=0.9)}]
    together = recognise(clips)
    assert together == [recognise([each])[0] for each in clips] and all(isinstance(text, str) for text in together)


@pytest.mark.parametrize("has_pad_token", [True, False])
def test_whisper_hears_short_clips_together_and_long_ones_whole(has_pad_token, tmp_path, monkeypatch):
    """transformers' pipeline refuses batches of a model whose tokenizer has no pad token, which stopped evaluate.py.

    It also searched with five beams.
    """
    letters = {letter: index for index, letter in enumerate(sorted(ByteLevel.alphabet()))}
    end = "<|endoftext|>"
    tokenizer = WhisperTokenizer(letters, [], unk_token=end, bos_token=end, eos_token=end, pad_token=end)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|startoftranscript|>", "<|notimestamps|>"]})
    tokenizer.add_tokens([f"<|{0.02 * step:.2f}|>" for step in range(1501)])
    if not has_pad_token:
        tokenizer.pad_token = None
    WhisperProcessor(WhisperFeatureExtractor(), tokenizer).save_pretrained(tmp_path)
    assert (WhisperTokenizer.from_pretrained(tmp_path).pad_token is not None) == has_pad_token
    ids = tokenizer.get_vocab()
    special = {f"{name}_token_id": ids[end] for name in ("bos", "eos")}
    special["pad_token_id"] = ids[end] if has_pad_token else None
    torch.manual_seed(0)
    config = speech_config(
        vocab_size=len(tokenizer), **special, decoder_start_token_id=ids["<|startoftranscript|>"], init_std=0.5
    )
    whisper = WhisperForConditionalGeneration(config)
    options = {"is_multilingual": False, "max_length": 20, "max_initial_timestamp_index": 50}
    options |= {"no_timestamps_token_id": ids["<|notimestamps|>"], "begin_suppress_tokens": [ids[end]]}
    for name, value in {**options, "_from_model_config": False}.items():
        setattr(whisper.generation_config, name, value)
    whisper.save_pretrained(tmp_path)
    recognise = load_recognizer(str(tmp_path))
    asked, generate = [], WhisperForConditionalGeneration.generate
    monkeypatch.setattr(
        WhisperForConditionalGeneration,
        "generate",
        lambda self, *given, **options: (asked.append(options), generate(self, *given, **options))[1],
    )
    clips = [{"array": clip(duration_s), "sampling_rate": SAMPLING_RATE} for duration_s in (0.5, 2.0)]
    together = recognise(clips)
    assert together == [recognise([each])[0] for each in clips] and all(together)
    long = {"array": clip(31.0), "sampling_rate": SAMPLING_RATE}
    assert len(recognise([clips[0], long])) == 2
    beams = [options.get("num_beams") or options["generation_config"].num_beams for options in asked]
    assert beams and set(beams) == {1}


# -- scores -----------------------------------------------------------------------------------------------------------


def line(row_id, answer="red", given="red", **fields):
    return {"id": row_id, "answer": answer, "predicted": {"answers": given}, **fields}


@pytest.fixture(scope="module")
def scorer():
    return Scorer(TASKS, num_resamples=300)


def test_a_score_lies_in_its_interval_which_is_narrower_for_more_rows(scorer):
    rng = np.random.default_rng(0)
    errors, words = rng.integers(0, 3, 400), rng.integers(3, 9, 400)
    many, few = scorer.ratio(errors, words), scorer.ratio(errors[:25], words[:25])
    assert many["value"] == pytest.approx(errors.sum() / words.sum()) and many["n"] == 400
    assert many["low"] < many["value"] < many["high"]
    assert many["high"] - many["low"] < 0.5 * (few["high"] - few["low"])
    # The spread of a mean, by the normal approximation.
    shares = scorer.ratio(errors > 0, np.ones(400))
    expected = 2 * 1.96 * np.std(errors > 0) / 20
    assert shares["high"] - shares["low"] == pytest.approx(expected, rel=0.15)
    assert scorer.ratio(errors, words) == many, "seeded"


def test_answers_are_scored_by_kind_by_voices_and_against_text(scorer):
    rows = [("1", "seen voices", "colour"), ("2", "held out voices", "colour"), ("3", "seen voices", "animal")]
    text = [line(row_id, voice_group=group, kind=kind) for row_id, group, kind in rows]
    speech = [{**one, "predicted": {"answers": given}} for one, given in zip(text, ("Red.", "it is red", "blue"))]
    scores = scorer({"text": text, "speech": speech})
    answers = scores["speech"]["answers"]
    assert answers["exact_match"]["value"] == pytest.approx(1 / 3) and answers["exact_match"]["n"] == 3
    assert answers["contained"]["value"] == pytest.approx(2 / 3)
    assert {kind: of["exact_match"]["value"] for kind, of in answers["by_kind"].items()} == {"animal": 0, "colour": 0.5}
    assert answers["by_voice_group"]["held out voices"]["contained"]["value"] == 1
    assert answers["share_of_text"]["value"] == pytest.approx(1 / 3)
    assert answers["contained_share_of_text"]["value"] == pytest.approx(2 / 3)
    assert set(scores["speech"]) == {"answers"}, "no row takes part in the other tasks"


def test_word_times_are_absolute_errors_in_milliseconds(scorer):
    lines = [
        {"id": "1", "predicted": {}, "word_errors_s": [[-0.01, 0.03], [0.05, -0.07]], "num_words": 3},
        {"id": "2", "predicted": {}, "word_errors_s": [], "num_words": 1},
    ]
    times = scorer({"speech": lines})["speech"]["alignment"]["word_times"]
    assert times["median_ms"]["value"] == pytest.approx(40)
    assert times["words_right"]["value"] == 0.5


def test_case_and_punctuation_make_no_word_wrong():
    """An LLM writes "The cat." where the transcript has "the cat", and none of these words had a time."""
    said = [{"text": "the", "start": 0.1, "end": 0.2}, {"text": "cat", "start": 0.3, "end": 0.5}]
    heard = [{"text": " The", "timestamp": (0.2, 0.2)}, {"text": " cat.", "timestamp": (0.3, 0.6)}]
    np.testing.assert_allclose(errors_of({"words": said}, heard), [(0.1, 0.0), (0.0, 0.1)])


def test_counts_within_one_and_costs_have_intervals(scorer):
    lines = [
        {"id": str(miss), "predicted": {}, "alignment": {"token_count_error": [miss, 1.0]}} for miss in (0, 1, 2, 5)
    ]
    alignment = scorer({"speech": lines})["speech"]["alignment"]
    assert alignment["token_count_within_one"]["value"] == 0.5 and alignment["token_count_error"]["value"] == 2
    cost = scorer.cost({"speech": {"num_parameters": 7_000_000, "first_token_ms": [10.0, 20.0, 90.0]}})
    assert cost["speech"]["first_token_ms"]["value"] == 20 and cost["speech"]["num_parameters"] == 7_000_000
    settings = {"model": "m", "data": "rows.jsonl", "num_rows": 4}
    table = as_markdown({"settings": settings, "systems": scorer({"speech": lines, "text": []}), "cost": cost})
    assert "first token, ms (3 rows)" in table and "| 7.0 " in table and "20 [10, 90]" in table


def test_report_shows_what_there_is(scorer, tmp_path):
    text = [line(str(number), kind="colour") for number in range(4)]
    speech = [{**one, "predicted": {"answers": "red" if one["id"] < "3" else "blue"}} for one in text]
    settings = {"model": "m", "data": "rows.jsonl", "num_rows": 4}
    results = {"settings": settings, "systems": scorer({"text": text, "speech": speech})}
    table = as_markdown(results)
    assert "m on rows.jsonl: 4 rows" in table
    assert "0.750 [0.250, 1.000]" in table and "colour" in table and "WER" not in table and "(4 rows)" not in table
    results["settings"]["num_rows"] = 5
    assert "exact match (4 rows)" in as_markdown(results)
    for picture in plot(results, tmp_path):
        assert picture.stat().st_size > 5000
    assert len(plot(results, tmp_path)) == 2


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, processor):
    """A model and a manifest of three rows."""
    folder = tmp_path_factory.mktemp("evaluated")
    make_model(plora={"lora_dropout": 0.0}).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    rows = []
    for index, text in enumerate(TEXTS):
        (folder / f"{index}.flac").write_bytes(flac(index, 0.5 + 0.3 * index))
        rows.append({"audio": f"{index}.flac", "text": text, "instruction": "repeat", "answer": text, "kind": "k"})
    write_manifest(folder / "rows.jsonl", rows)
    return folder


def arguments(folder, output, *options):
    given = ["--model", folder / "model", "--manifest", folder / "rows.jsonl", "--output", folder / output]
    return [str(argument) for argument in (*given, "--max_new_tokens", 5, "--num_resamples", 50, *options)]


@pytest.mark.long
def test_a_run_that_goes_on_gives_what_one_run_gives(folder, monkeypatch, capsys):
    def run(*given):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments(folder, *given)])
        main()

    run("stopped", "--limit", 1, "--systems", "text,speech")
    first = (folder / "stopped" / "predictions" / "speech.jsonl").read_text()
    run("stopped", "--systems", "text,speech,blind,cascade", "--batch_size", 2)
    assert (folder / "stopped" / "predictions" / "speech.jsonl").read_text().startswith(first)
    run("at_once", "--systems", "cascade,blind,speech,text")
    assert (folder / "at_once" / "results.md").read_text() in capsys.readouterr().out

    results, expected = (json.loads((folder / name / "results.json").read_text()) for name in ("stopped", "at_once"))
    assert results["settings"]["num_rows"] == 3
    assert list(results["systems"]) == ["text", "speech", "blind", "cascade"]
    for system, scores in expected["systems"].items():
        again = results["systems"][system]
        assert again["transcripts"] == scores["transcripts"] and again["answers"] == scores["answers"]
    for name, score in expected["systems"]["speech"]["alignment"].items():
        assert results["systems"]["speech"]["alignment"][name]["value"] == pytest.approx(score["value"], rel=1e-3)

    with pytest.raises(ValueError, match=r"other settings \(tasks: "):
        run("stopped", "--tasks", "answers")
    with pytest.raises(SystemExit):
        run("stopped", "--systems", "speech,telepathy")
    assert "expected some of text,speech,blind,cascade, got 'speech,telepathy'" in capsys.readouterr().err


@pytest.mark.long
def test_kept_frames_stand_for_the_clips_of_a_later_run(folder, monkeypatch):
    heard = []
    encode = TrueLengthWhisperEncoder.forward

    def count(self, input_features, input_features_mask, **options):
        heard.append(len(input_features))
        return encode(self, input_features, input_features_mask, **options)

    monkeypatch.setattr(TrueLengthWhisperEncoder, "forward", count)
    for output in ("encoded", "again"):
        given = ("--kept_frames", folder / "frames", "--systems", "text,speech", "--batch_size", 2)
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments(folder, output, *given)])
        main()
    assert sum(heard) == 3, "each clip once, for all tasks and both runs"
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments(folder, "without", "--systems", "text,speech")])
    main()
    results = [json.loads((folder / name / "results.json").read_text()) for name in ("encoded", "again", "without")]
    assert results[0]["systems"] == results[1]["systems"]
    for name, score in results[2]["systems"]["speech"]["alignment"].items():
        assert results[0]["systems"]["speech"]["alignment"][name]["value"] == pytest.approx(score["value"], rel=0.01)


def test_a_clip_that_cannot_be_heard_is_named(folder, monkeypatch, tmp_path):
    rows = [{"audio": str(folder / f"{index}.flac"), "text": text} for index, text in enumerate(TEXTS)]
    (tmp_path / "bad.flac").write_bytes(b"no sound")
    manifest = write_manifest(tmp_path / "rows.jsonl", [rows[0], {**rows[1], "id": "x7", "audio": "bad.flac"}])
    options = ("--manifest", manifest, "--allow_outside_paths", "--systems", "speech", "--batch_size", 1)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments(folder, tmp_path / "output", *options)])
    with pytest.raises(ValueError, match=r"Row x7: .*bad\.flac cannot be decoded"):
        main()
    assert len((tmp_path / "output" / "predictions" / "speech.jsonl").read_text().splitlines()) == 1


@pytest.mark.long
def test_the_command_leaves_tables_and_pictures(folder):
    """The script's folder is on its path, so `import evaluate` in its metrics gave the script, not the package.

    What it runs must not need the package.
    """
    command = [sys.executable, EXAMPLES / "evaluate.py", *arguments(folder, "command", "--systems", "text,blind")]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "| exact match" in finished.stdout and "3 rows, 95 % intervals" in finished.stdout
    written = {path.name for path in (folder / "command").iterdir()}
    assert written == {"predictions", "results.json", "results.md", "scores.png", "by_kind.png"}


@pytest.mark.long
def test_without_data_only_the_clips_of_the_limit_are_synthesised(tmp_path):
    """All 960 clips of the default were synthesised before the first row, whatever the limit."""
    options = argparse.Namespace(split=None, num_utterances=40, cache_dir=tmp_path, limit=3)
    name, rows = tiny_world(options)
    assert name == "tiny world, test, 40 per kind of voice", "a rerun with a higher limit goes on"
    assert [row["voice_group"] for row in rows] == ["seen voices", "held out voices", "seen voices"]
    assert len([*tmp_path.glob("*.flac")]) <= 4 and all(Path(row["audio"]).exists() for row in rows)
    assert all(row["words"] for row in rows) and TINY_WORLD_TRANSLATION in INSTRUCTIONS["spanish"]
