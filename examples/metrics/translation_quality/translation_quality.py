"""BLEU and chrF of translations: an `evaluate` module, loaded by path.

Follows sacrebleu (https://aclanthology.org/W18-6319), with its own bootstrap over rows. Leaves out: several references
per row, and learned metrics.
"""

import json

import datasets
import evaluate
from sacrebleu.metrics import BLEU, CHRF

DESCRIPTION = """
Corpus BLEU and chrF2 of sacrebleu, 0 to 100. Texts are not normalised: case and punctuation count, and BLEU's tokenizer
is sacrebleu's ("13a" unless told otherwise; "zh" for Chinese, "ja-mecab" for Japanese, "char" for scripts without spaces).
"""
KWARGS_DESCRIPTION = """
Args:
    predictions, references: lists of str.
    tokenize: BLEU's tokenizer.
    num_resamples: bootstrap samples of the intervals; 0 for none. sacrebleu's seed is 12345 (SACREBLEU_SEED).
Returns:
    bleu, chrf; with num_resamples also bleu_interval and chrf_interval, pairs that hold 95 % of the resampled scores,
    as mean and half-width.
"""


class TranslationQuality(evaluate.Metric):
    def _info(self):
        strings = {name: datasets.Value("string") for name in ("predictions", "references")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=KWARGS_DESCRIPTION,
            features=datasets.Features(strings),
        )

    def _compute(self, predictions, references, tokenize="13a", num_resamples=0):
        results = {}
        for name, metric in (("bleu", BLEU(tokenize=tokenize)), ("chrf", CHRF())):
            score = metric.corpus_score(predictions, [references], n_bootstrap=max(1, num_resamples))
            results[name] = score.score
            if num_resamples > 1:
                told = json.loads(score.format(width=6, signature=str(metric.get_signature()), is_json=True))
                # Left out by sacrebleu where every resample scores 0.
                mean, half_width = told.get("confidence_mean", 0.0), told.get("confidence_var", 0.0)
                results[f"{name}_interval"] = [mean - half_width, mean + half_width]
        return results
