"""How many answers match: an `evaluate` module, loaded by path.

Follows the exact match and the contained match of question answering benchmarks. Leaves out: several gold answers per
question, and judgement by another model.
"""

import datasets
import evaluate
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

DESCRIPTION = """
Share of answers that equal the gold answer (exact_match), and share of answers that hold it as whole words (contained).
Both sides are normalised by transformers' BasicTextNormalizer: lower case, what stands in brackets removed, punctuation
and symbols to spaces, white space collapsed.
"""
KWARGS_DESCRIPTION = """
Args:
    predictions, references: lists of str.
    per_row: also return the matches of each row, as lists of 0 and 1.
Returns:
    exact_match, contained: shares, 0 to 1; with per_row also exact_match_rows and contained_rows.
"""


class AnswerMatch(evaluate.Metric):
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
        exact, contained = [], []
        for number, (prediction, reference) in enumerate(zip(predictions, references)):
            given, gold = normalize(prediction).strip(), normalize(reference).strip()
            if not gold:
                raise ValueError(f"Reference {number} has no word left when it is normalised: {reference!r}.")
            exact.append(int(given == gold))
            contained.append(int(f" {gold} " in f" {given} "))
        results = {"exact_match": sum(exact) / len(exact), "contained": sum(contained) / len(contained)}
        rows = {"exact_match_rows": exact, "contained_rows": contained}
        return {**results, **rows} if per_row else results
