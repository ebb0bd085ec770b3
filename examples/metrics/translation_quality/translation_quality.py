"""BLEU and chrF of translations: an `evaluate` module, loaded by path.

Follows sacrebleu (https://aclanthology.org/W18-6319), which counts and scores. Leaves out: several references
per row, and learned metrics.
"""

import datasets
import evaluate
import numpy as np
from sacrebleu.metrics import BLEU, CHRF

DESCRIPTION = """
Corpus BLEU and chrF2 of sacrebleu, 0 to 100. Texts are not normalised: case and punctuation count. BLEU's tokenizer is
sacrebleu's "13a" unless told otherwise ("zh" for Chinese, "ja-mecab" for Japanese, "char" for scripts without spaces).
BLEU counts n-grams up to 4, or up to the length of the longest translation where all are shorter.
"""
KWARGS_DESCRIPTION = """
Args:
    predictions, references: lists of str.
    tokenize: BLEU's tokenizer.
    num_resamples: bootstrap samples (of rows) for the intervals; 0 for none.
    seed: of the samples.
Returns:
    bleu, chrf; with num_resamples also bleu_interval and chrf_interval: the 2.5th and 97.5th percentile.
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

    def _compute(self, predictions, references, tokenize="13a", num_resamples=0, seed=0):
        results = {}
        # Without effective_order, BLEU is 0 where no translation has four words. It changes nothing else.
        for name, metric in (("bleu", BLEU(tokenize=tokenize, effective_order=True)), ("chrf", CHRF())):
            results[name] = metric.corpus_score(predictions, [references]).score
            if num_resamples:
                # The two steps of corpus_score. Its own n_bootstrap fails where some resamples score 0 and others do
                # not (it mixes float and float32), and takes memory for rows times resamples.
                counts = np.array(metric._extract_corpus_statistics(predictions, [references]))
                rng = np.random.default_rng(seed)
                drawn = (counts[rng.integers(len(counts), size=len(counts))] for _ in range(num_resamples))
                scores = [metric._compute_score_from_stats(rows.sum(0).tolist()).score for rows in drawn]
                results[f"{name}_interval"] = np.percentile(scores, [2.5, 97.5]).tolist()
        return results
