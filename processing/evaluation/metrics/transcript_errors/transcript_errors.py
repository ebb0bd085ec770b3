"""Word and character error rates of transcripts: an `evaluate` module, loaded by path, over `text_scores.py`."""

import inspect

import datasets
import evaluate

from processing.evaluation.text_scores import count_transcript_errors

DESCRIPTION, USAGE = (inspect.getdoc(count_transcript_errors) or "").split("\n\n", 1)


class TranscriptErrors(evaluate.Metric):
    def _info(self):
        strings = {name: datasets.Value("string") for name in ("predictions", "references")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=USAGE,
            features=datasets.Features(strings),
        )

    def _compute(self, predictions, references, **kwargs):
        return count_transcript_errors(predictions, references, **kwargs)
