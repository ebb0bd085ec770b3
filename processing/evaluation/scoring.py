"""Scores of what systems predicted, each with its interval.

Intervals hold 95 % of what a percentile bootstrap over rows gives (Efron 1979); scores of a whole corpus (WER, BLEU)
are computed anew from each sample's rows. If no row has an error, or if there are few rows, they are too narrow. Leaves
out: the spread over seeds of training, which one model cannot tell.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np

from .text_scores import count_transcript_errors, match_answers, score_translations

INTERVAL = (2.5, 97.5)
ALIGNMENT = ("response_kl", "response_agreement", "input_kl", "token_count_error", "token_count_accuracy")


class Scorer:
    """Scores predictions.

    Args:
        tasks: what to score.
        num_resamples: bootstrap samples of an interval.
        seed: of the samples.
        bleu_tokenizer: sacrebleu's, which depends on the language of the translations.
        normalizer: of answers and transcripts, see `text_scores.py`.
    """

    def __init__(
        self,
        tasks: Iterable[str],
        num_resamples: int = 1000,
        seed: int = 0,
        bleu_tokenizer: str = "13a",
        normalizer: str = "basic",
    ):
        self.tasks, self.num_resamples, self.seed = tasks, num_resamples, seed
        self.bleu_tokenizer, self.normalizer = bleu_tokenizer, normalizer

    def __call__(self, predictions: dict[str, list[dict]]) -> dict[str, dict]:
        """Score the lines of each system (`Systems.predict`), of the same rows in the same order.

        Returns:
            by system and task, each score as `{"value", "low", "high", "n"}`, n the number of rows. A task that no row
            takes part in is left out.
        """
        scores: dict[str, dict] = {}
        for system, lines in predictions.items():
            scores[system] = {}
            for task in self.tasks:
                scored = getattr(self, f"_{task}")(lines)
                if scored:
                    scores[system][task] = scored
        self._compare_with_text(predictions, scores)
        return scores

    def bootstrap(self, statistic: Callable[..., np.ndarray], num_rows: int) -> dict:
        """Compute a statistic of all rows, and its interval from samples of them; it takes an array of row numbers."""
        rng = np.random.default_rng(self.seed)
        samples = [statistic(rng.integers(num_rows, size=num_rows)) for _ in range(self.num_resamples)]
        low, high = np.nanpercentile(samples, INTERVAL)
        return {"value": float(statistic(np.arange(num_rows))), "low": float(low), "high": float(high), "n": num_rows}

    def ratio(self, numerators: Sequence[float] | np.ndarray, denominators: Sequence[float] | np.ndarray) -> dict:
        """Return the sum of the numerators divided by the sum of the denominators, both given by row."""
        above, below = np.asarray(numerators, float), np.asarray(denominators, float)

        def statistic(rows):
            total = below[rows].sum()
            return above[rows].sum() / total if total else np.nan

        return self.bootstrap(statistic, len(above))

    def cost(self, measured: dict[str, dict]) -> dict[str, dict]:
        """Return what `measure_cost` measured, with the median of the times and its interval in their place."""
        costs = {}
        for system, cost in measured.items():
            median = partial(_median_of, np.array(cost["first_token_ms"]))
            costs[system] = {**cost, "first_token_ms": self.bootstrap(median, len(cost["first_token_ms"]))}
        return costs

    def _answers(self, lines) -> dict:
        lines = [line for line in lines if "answers" in line["predicted"]]
        if not lines:
            return {}
        matches = self._matches(lines)

        def score(rows) -> dict:
            return {
                name: self.ratio([matches[f"{name}_rows"][row] for row in rows], np.ones(len(rows)))
                for name in ("exact_match", "contained")
            }

        scores = score(range(len(lines)))
        for field, name in (("kind", "by_kind"), ("voice_group", "by_voice_group")):
            groups = defaultdict(list)
            for row, line in enumerate(lines):
                if line.get(field):
                    groups[line[field]].append(row)
            if groups:
                scores[name] = {group: score(rows) for group, rows in sorted(groups.items())}
        return scores

    def _transcripts(self, lines) -> dict:
        lines = [line for line in lines if "transcripts" in line["predicted"]]
        if not lines:
            return {}
        pairs = _pairs(lines, "transcripts", "text")
        counts = count_transcript_errors(*pairs, per_row=True, normalizer=self.normalizer)
        return {
            "wer": self.ratio(counts["word_errors"], counts["words"]),
            "cer": self.ratio(counts["char_errors"], counts["chars"]),
        }

    def _translation(self, lines) -> dict:
        lines = [line for line in lines if "translation" in line["predicted"]]
        if not lines:
            return {}
        made = score_translations(
            *_pairs(lines, "translation", "translation"), self.bleu_tokenizer, self.num_resamples, self.seed
        )
        return {
            name: dict(zip(("value", "low", "high", "n"), (made[name], *made[f"{name}_interval"], len(lines))))
            for name in ("bleu", "chrf")
        }

    def _alignment(self, lines) -> dict:
        aligned = [line["alignment"] for line in lines if "alignment" in line]
        scores = {
            name: self.ratio(*zip(*(line[name] for line in aligned)))
            for name in ALIGNMENT
            if aligned and name in aligned[0]
        }
        misses = [line["token_count_error"][0] for line in aligned if "token_count_error" in line]
        if misses:
            scores["token_count_within_one"] = self.ratio(np.less_equal(misses, 1), np.ones(len(misses)))
        timed = [line for line in lines if "word_errors_s" in line]
        if timed:
            scores["word_times"] = self._word_times(timed)
        return scores

    def _word_times(self, lines) -> dict:
        """Return the absolute errors of starts and ends of the correctly transcribed words, milliseconds."""
        errors = [1000 * np.abs(np.array(line["word_errors_s"], float).ravel()) for line in lines]

        def percentile(percent):
            def statistic(rows):
                drawn = np.concatenate([errors[row] for row in rows])
                return np.percentile(drawn, percent) if len(drawn) else np.nan

            return statistic

        num_right = [len(line["word_errors_s"]) for line in lines]
        scores = {"words_right": self.ratio(num_right, [line["num_words"] for line in lines])}
        if any(num_right):
            scores["median_ms"] = self.bootstrap(percentile(50), len(lines))
            scores["percentile_90_ms"] = self.bootstrap(percentile(90), len(lines))
        return scores

    def _matches(self, lines) -> dict:
        """Return the matches of the lines that answer."""
        lines = [line for line in lines if "answers" in line["predicted"]]
        return match_answers(*_pairs(lines, "answers", "answer"), per_row=True, normalizer=self.normalizer)

    def _compare_with_text(self, predictions, scores):
        """Add to each system's answers its matches over those of `text`, of the same samples of rows."""
        if "answers" not in scores.get("text", {}):
            return
        matches = {system: self._matches(lines) for system, lines in predictions.items()}
        for name, share in (("exact_match", "share_of_text"), ("contained", "contained_share_of_text")):
            if not scores["text"]["answers"][name]["value"]:
                continue
            for system in set(predictions) - {"text"}:
                rows = (matches[each][f"{name}_rows"] for each in (system, "text"))
                scores[system]["answers"][share] = self.ratio(*rows)


def _median_of(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.median(values[rows])


def _pairs(lines: list[dict], task: str, gold: str) -> tuple[list[str], list[str]]:
    """Return what was predicted for a task, and the texts to compare it with."""
    return [line["predicted"][task] for line in lines], [line[gold] for line in lines]
