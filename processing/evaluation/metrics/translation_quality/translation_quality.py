"""BLEU and chrF of translations: an `evaluate` module, loaded by path, over `text_scores.py`."""

import inspect

import datasets
import evaluate

from processing.evaluation.text_scores import score_translations

DESCRIPTION, USAGE = (inspect.getdoc(score_translations) or "").split("\n\n", 1)


class TranslationQuality(evaluate.Metric):
    def _info(self):
        strings = {name: datasets.Value("string") for name in ("predictions", "references")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=USAGE,
            features=datasets.Features(strings),
        )

    def _compute(self, predictions, references, **kwargs):
        return score_translations(predictions, references, **kwargs)
