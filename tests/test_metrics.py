"""The `evaluate` modules of processing/evaluation: known values, normalisers, and what they count by row."""

import runpy
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import sacrebleu

from processing.evaluation import text_scores

METRICS = Path(text_scores.__file__).parent / "metrics"
TEXTS = ["the red cat ran to the river", "john sold two books", "it was not very good"]


@pytest.fixture(scope="module")
def metrics():
    return {path.name: evaluate.load(str(path), keep_in_memory=True) for path in METRICS.iterdir()}


def test_what_is_right_has_the_best_score(metrics):
    best = {
        "answer_match": {"exact_match": 1, "contained": 1},
        "transcript_errors": {"wer": 0, "cer": 0},
        "translation_quality": {"bleu": pytest.approx(100), "chrf": pytest.approx(100)},
    }
    assert set(best) == set(metrics)
    for name, scores in best.items():
        assert metrics[name].compute(predictions=TEXTS, references=TEXTS) == scores
        assert metrics[name].description.strip() and metrics[name].inputs_description.strip()


def test_answers_match_as_wholes_or_as_words_within(metrics):
    pairs = [("The river.", "the river"), ("It ran to the river", "river"), ("a riverside", "river"), ("sea", "river")]
    predictions, references = map(list, zip(*pairs))
    scores = metrics["answer_match"].compute(predictions=predictions, references=references, per_row=True)
    assert scores["exact_match_rows"] == [1, 0, 0, 0] and scores["exact_match"] == 0.25
    assert scores["contained_rows"] == [1, 1, 0, 0] and scores["contained"] == 0.5


def test_case_punctuation_and_space_are_no_errors(metrics):
    given = dict(predictions=["  The RED cat -- ran!"], references=["the red cat ran"])
    assert metrics["transcript_errors"].compute(**given) == {"wer": 0, "cer": 0}
    assert metrics["answer_match"].compute(**given)["exact_match"] == 1
    accents = dict(predictions=["el raton"], references=["el ratón"])
    assert metrics["transcript_errors"].compute(**accents)["wer"] == 0.5, "letters with accents are other letters"


def test_the_english_normaliser_takes_digits_and_contractions_for_words(metrics):
    given = dict(predictions=["It's 20 dogs."], references=["it is twenty dogs"])
    assert metrics["transcript_errors"].compute(**given)["wer"] == 0.5
    assert metrics["transcript_errors"].compute(**given, normalizer="english") == {"wer": 0, "cer": 0}
    five = dict(predictions=["The answer is five."], references=["5"])
    assert metrics["answer_match"].compute(**five)["contained"] == 0
    assert metrics["answer_match"].compute(**five, normalizer="english")["contained"] == 1
    with pytest.raises(ValueError, match="no normaliser 'klingon'. Take one of basic, english"):
        text_scores.match_answers(["a"], ["a"], normalizer="klingon")


def edits(given, gold):
    """Levenshtein distance, from its definition."""
    if not given or not gold:
        return len(given) + len(gold)
    return min(
        edits(given[1:], gold[1:]) + (given[0] != gold[0]), edits(given[1:], gold) + 1, edits(given, gold[1:]) + 1
    )


def test_transcript_errors_are_edits_over_lengths(metrics):
    pairs = [("a b c", "a x c d"), ("", "b a"), ("a a b", "a")]
    predictions, references = map(list, zip(*pairs))
    scores = metrics["transcript_errors"].compute(predictions=predictions, references=references, per_row=True)
    assert scores["word_errors"] == [edits(given.split(), gold.split()) for given, gold in pairs] == [2, 2, 2]
    assert scores["words"] == [4, 2, 1] and scores["wer"] == pytest.approx(6 / 7)
    assert scores["char_errors"] == [edits(given, gold) for given, gold in pairs]
    assert scores["cer"] == pytest.approx(sum(scores["char_errors"]) / sum(map(len, references)))


@pytest.mark.parametrize("name", ["answer_match", "transcript_errors"])
def test_a_reference_without_words_is_named(metrics, name):
    with pytest.raises(ValueError, match=r"Reference 1 has no word left when it is normalised: '\(\.\.\.\)'"):
        metrics[name].compute(predictions=["a", "b"], references=["a", "(...)"])


def test_translation_quality_is_sacrebleus(metrics):
    given = ["the red cat walked to the river", "john sold two books", "it was good"]
    scores = metrics["translation_quality"].compute(predictions=given, references=TEXTS)
    assert scores["bleu"] == pytest.approx(sacrebleu.corpus_bleu(given, [TEXTS]).score)
    assert scores["chrf"] == pytest.approx(sacrebleu.corpus_chrf(given, [TEXTS]).score)
    assert 0 < scores["bleu"] < 100


def test_short_translations_count(metrics):
    """Corpus BLEU gave 0 to translations that were all right, since none had the four words of a 4-gram."""
    short = ["gato rojo", "dos libros"]
    assert metrics["translation_quality"].compute(predictions=short, references=short)["bleu"] == pytest.approx(100)


def test_intervals_of_translations_are_scores_of_resampled_rows(metrics):
    given = ["the red cat walked to the river", "john sold two books", "completely other words here"]
    options = dict(predictions=given, references=TEXTS, num_resamples=200, seed=3)
    scores = metrics["translation_quality"].compute(**options)
    rng, drawn = np.random.default_rng(3), []
    for _ in range(200):
        rows = rng.integers(3, size=3)
        drawn.append(sacrebleu.corpus_chrf([given[row] for row in rows], [[TEXTS[row] for row in rows]]).score)
    assert scores["chrf_interval"] == pytest.approx(np.percentile(drawn, [2.5, 97.5]).tolist())
    low, high = scores["bleu_interval"]
    assert low < scores["bleu"] < high
    assert metrics["translation_quality"].compute(**options) == scores


def test_without_the_extra_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(ImportError, match="need jiwer and sacrebleu .*with the extra 'metrics': pip install") as raised:
        runpy.run_path(text_scores.__file__)
    assert raised.value.__suppress_context__, "python would show the error of the import first"
