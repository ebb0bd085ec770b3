"""How many answers match: an `evaluate` module, loaded by path, over `text_scores.py`."""

import inspect

import datasets
import evaluate

from processing.evaluation.text_scores import match_answers

DESCRIPTION, USAGE = (inspect.getdoc(match_answers) or "").split("\n\n", 1)


class AnswerMatch(evaluate.Metric):
    def _info(self):
        strings = {name: datasets.Value("string") for name in ("predictions", "references")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=USAGE,
            features=datasets.Features(strings),
        )

    def _compute(self, predictions, references, **kwargs):
        return match_answers(predictions, references, **kwargs)
