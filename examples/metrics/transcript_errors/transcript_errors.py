"""Word and character error rates of transcripts: an `evaluate` module, loaded by path.

Follows jiwer, which counts the edits. Leaves out: normalisers of single languages (numbers, spellings).
"""

import datasets
import evaluate
import jiwer
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

DESCRIPTION = """
Word error rate and character error rate: substitutions, deletions and insertions over the words (characters) of all
references. Both sides are normalised by transformers' BasicTextNormalizer: lower case, what stands in brackets removed,
punctuation and symbols to spaces, white space collapsed. Characters count the spaces between words.
"""
KWARGS_DESCRIPTION = """
Args:
    predictions, references: lists of str.
    per_row: also return the edits and lengths of each row.
Returns:
    wer, cer: rates, 0 is perfect, may pass 1; with per_row also word_errors, words, char_errors and chars.
"""


class TranscriptErrors(evaluate.Metric):
    def _info(self):
        strings = {name: datasets.Value("string") for name in ("predictions", "references")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=KWARGS_DESCRIPTION,
            features=datasets.Features(strings),
        )

    def _compute(self, predictions, references, per_row=False):
        normalize = BasicTextNormalizer()
        rows = {"word_errors": [], "words": [], "char_errors": [], "chars": []}
        for number, (prediction, reference) in enumerate(zip(predictions, references)):
            given, gold = normalize(prediction).strip(), normalize(reference).strip()
            if not gold:
                raise ValueError(f"Reference {number} has no word left when it is normalised: {reference!r}.")
            for unit, made in (
                ("word", jiwer.process_words(gold, given)),
                ("char", jiwer.process_characters(gold, given)),
            ):
                rows[f"{unit}_errors"].append(made.substitutions + made.deletions + made.insertions)
                rows[f"{unit}s"].append(made.hits + made.substitutions + made.deletions)
        results = {
            "wer": sum(rows["word_errors"]) / sum(rows["words"]),
            "cer": sum(rows["char_errors"]) / sum(rows["chars"]),
        }
        return {**results, **rows} if per_row else results
