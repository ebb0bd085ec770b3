"""Scores of texts against references: matching answers, errors of transcripts, quality of translations.

Follows the exact match and the contained match of question answering benchmarks; jiwer, which counts the edits; and
sacrebleu (https://aclanthology.org/W18-6319). The folder `metrics` has them as modules of the package `evaluate`.
Leaves out: several references per row, normalisers of languages other than English, and judgement by another model.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

try:
    import jiwer
    from sacrebleu.metrics import BLEU, CHRF
    from sacrebleu.metrics.helpers import extract_all_char_ngrams
except ImportError as error:
    raise ImportError(
        f"Scores of texts need jiwer and sacrebleu ({error}). Install them with the extra 'metrics': "
        "pip install -e '.[metrics]'."
    ) from None

# Both are of transformers and lower the case, remove what stands in brackets, and turn punctuation to spaces. The
# English one is Whisper's: it also writes numbers in digits, spells out contractions and titles, and drops fillers. Its
# table of British spellings comes with Whisper's tokenizers and is not applied here.
NORMALIZERS: dict[str, Callable[[], Callable[[str], str]]] = {
    "basic": BasicTextNormalizer,
    "english": lambda: EnglishTextNormalizer({}),
}


def match_answers(
    predictions: list[str], references: list[str], per_row: bool = False, normalizer: str = "basic"
) -> dict:
    """Return the share of answers that equal the gold answer (exact_match), and that hold it as whole words
    (contained). Both sides are normalised.

    Args:
        per_row: also return the matches of each row, as lists of 0 and 1.
        normalizer: of `NORMALIZERS`: basic (lower case, no brackets, no punctuation) or english (Whisper's, which also
            writes numbers in digits).

    Returns:
        `exact_match` and `contained`: shares, 0 to 1; with `per_row` also `exact_match_rows` and `contained_rows`.

    Raises:
        ValueError: an unknown normaliser, or a reference has no word left when it is normalised.
    """
    exact, contained = [], []
    for given, gold in _normalized(predictions, references, normalizer):
        exact.append(int(given == gold))
        contained.append(int(f" {gold} " in f" {given} "))
    results = {"exact_match": sum(exact) / len(exact), "contained": sum(contained) / len(contained)}
    rows = {"exact_match_rows": exact, "contained_rows": contained}
    return {**results, **rows} if per_row else results


def count_transcript_errors(
    predictions: list[str], references: list[str], per_row: bool = False, normalizer: str = "basic"
) -> dict:
    """Return word and character error rates: substitutions, deletions and insertions over the words (characters) of all
    references. Both sides are normalised. Characters count the spaces between words.

    Args:
        per_row: also return the edits and lengths of each row.
        normalizer: of `NORMALIZERS`, as in [`match_answers`].

    Returns:
        `wer` and `cer`: rates, 0 is perfect, may pass 1; with `per_row` also `word_errors`, `words`, `char_errors` and
        `chars`.

    Raises:
        ValueError: an unknown normaliser, or a reference has no word left when it is normalised.
    """
    rows: dict[str, list[int]] = {"word_errors": [], "words": [], "char_errors": [], "chars": []}
    for given, gold in _normalized(predictions, references, normalizer):
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


def find_normalizer(name: str) -> Callable[[str], str]:
    """Return the normaliser of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in NORMALIZERS:
        raise ValueError(f"There is no normaliser {name!r}. Take one of {', '.join(NORMALIZERS)}.")
    return NORMALIZERS[name]()


def _normalized(predictions: list[str], references: list[str], normalizer: str) -> Iterator[tuple[str, str]]:
    normalize = find_normalizer(normalizer)
    for number, (prediction, reference) in enumerate(zip(predictions, references)):
        given, gold = normalize(prediction).strip(), normalize(reference).strip()
        if not gold:
            raise ValueError(f"Reference {number} has no word left when it is normalised: {reference!r}.")
        yield given, gold


def score_translations(
    predictions: list[str], references: list[str], tokenize: str = "13a", num_resamples: int = 0, seed: int = 0
) -> dict:
    """Return corpus BLEU and chrF2 of sacrebleu, 0 to 100. Texts are not normalised: case and punctuation count. BLEU
    counts n-grams up to 4, or up to the length of the longest translation where all are shorter.

    Args:
        tokenize: BLEU's tokenizer, by sacrebleu's name ("zh" for Chinese, "ja-mecab" for Japanese, "char" for scripts
            without spaces).
        num_resamples: bootstrap samples (of rows) for the intervals; 0 for none.
        seed: of the samples.

    Returns:
        `bleu` and `chrf`; with `num_resamples` also `bleu_interval` and `chrf_interval`: the 2.5th and 97.5th
        percentile.
    """
    # Without effective_order, BLEU is 0 where no translation has four words. It changes nothing else.
    bleu = BLEU(tokenize=tokenize, effective_order=True)
    results = {
        "bleu": bleu.corpus_score(predictions, [references]).score,
        "chrf": CHRF().corpus_score(predictions, [references]).score,
    }
    if num_resamples:
        # sacrebleu's own n_bootstrap fails where some resamples score 0 and others do not (it mixes float and float32),
        # and takes memory for rows times resamples.
        for name, counts_of, score_of in (("bleu", partial(_bleu_counts, bleu), _bleu), ("chrf", _chrf_counts, _chrf)):
            counts = np.array([counts_of(given, gold) for given, gold in zip(predictions, references)])
            rng = np.random.default_rng(seed)
            drawn = (counts[rng.integers(len(counts), size=len(counts))] for _ in range(num_resamples))
            results[f"{name}_interval"] = np.percentile([score_of(rows.sum(0)) for rows in drawn], [2.5, 97.5]).tolist()
    return results


def _bleu_counts(bleu: "BLEU", given: str, gold: str) -> list[int]:
    """Return the two lengths of one row, and its matches and totals of each order of n-grams."""
    score = bleu.sentence_score(given, [gold])
    return [score.sys_len, score.ref_len, *score.counts, *score.totals]


def _bleu(counts: np.ndarray) -> float:
    """Compute BLEU of summed counts, with the options of `score_translations`."""
    translation_length, reference_length, *of_orders = counts.tolist()
    matches, totals = of_orders[: len(of_orders) // 2], of_orders[len(of_orders) // 2 :]
    return BLEU.compute_bleu(
        matches, totals, translation_length, reference_length, smooth_method="exp", effective_order=True
    ).score


def _chrf_counts(given: str, gold: str) -> list[tuple[int, int, int]]:
    """Return, for each order of character n-grams, the number in the translation, in the reference, and in both.

    sacrebleu has no public way to them. As there, an order that the reference lacks counts no n-grams.
    """
    orders = zip(*(extract_all_char_ngrams(text, CHRF.CHAR_ORDER) for text in (given, gold)))
    return [(made.total() if wanted else 0, wanted.total(), (made & wanted).total()) for made, wanted in orders]


def _chrf(counts: np.ndarray) -> float:
    """Compute chrF of summed counts (num_orders, 3): F-beta of precision and recall, each a mean over the orders."""
    made, wanted, both = counts[(counts[:, 0] > 0) & (counts[:, 1] > 0)].T
    if not both.any():
        return 0.0
    precision, recall = (both / made).mean(), (both / wanted).mean()
    return float(100 * (1 + CHRF.BETA**2) * precision * recall / (CHRF.BETA**2 * precision + recall))
