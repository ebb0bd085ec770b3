"""Analyse the results of all runs: means with intervals, verdicts on claims, and a rank correlation.

Seeds and rows are both samples. Over seeds, Student's t is used, since there are few; over rows, the bootstrap.
Differences are paired over both, and their two uncertainties are added in quadrature. That counts what seeds and rows
share twice, so intervals are too wide rather than too narrow. Leaves out: corrections for the number of claims.
"""

import numpy as np
from scipy import stats

from .matrix import CLAIMS, Claim, Configuration

LEVEL = 0.95
NUM_RESAMPLES = 2000


def matches(results: list[dict], name: str, system: str) -> dict[int, np.ndarray]:
    """Return seed -> (R,) 0 and 1 of each row, for one system of one configuration."""
    return {
        result["seed"]: np.array([int(match) for match in result["systems"][system]["matched_rows"]])
        for result in results
        if result["name"] == name
    }


def interval_over_seeds(values) -> list[float] | None:
    """Return the interval of the mean by Student's t, or None for fewer than two seeds."""
    if len(values) < 2:
        return None
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return [float(np.mean(values) - half), float(np.mean(values) + half)]


def bootstrap_over_rows(means_of_rows: np.ndarray):
    """Return scipy's bootstrap result for the mean of (R,) values."""
    return stats.bootstrap(
        (means_of_rows,),
        np.mean,
        n_resamples=NUM_RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    )


def summarise(by_seed: dict[int, np.ndarray]) -> dict:
    """Return the mean share of matches and its two intervals."""
    of_seeds = [float(rows.mean()) for rows in by_seed.values()]
    interval = bootstrap_over_rows(np.mean(list(by_seed.values()), axis=0)).confidence_interval
    return {
        "exact_match": float(np.mean(of_seeds)),
        "by_seed": {str(seed): value for seed, value in zip(by_seed, of_seeds)},
        "over_seeds": interval_over_seeds(of_seeds),
        "over_rows": [float(interval.low), float(interval.high)],
    }


def difference(
    better: dict[int, np.ndarray], worse: dict[int, np.ndarray], seedless=frozenset(), share: float = 1.0
) -> dict:
    """Return the mean of `better - share * worse`, paired over rows and over the seeds that both have.

    Args:
        better, worse: seed -> (R,) 0 and 1.
        seedless: those of "better" and "worse" that draw nothing; their one run pairs with every seed.

    Returns:
        dict of `effect`, `interval` (over seeds and rows; of rows alone if there is one seed) and `num_seeds`, 0 if
        nothing pairs.
    """
    if "better" in seedless and better:
        better = dict.fromkeys(worse, next(iter(better.values())))
    if "worse" in seedless and worse:
        worse = dict.fromkeys(better, next(iter(worse.values())))
    seeds = sorted(set(better) & set(worse))
    if not seeds:
        return {"effect": None, "interval": None, "num_seeds": 0}
    differences = np.stack([better[seed] - share * worse[seed] for seed in seeds])
    effect = float(differences.mean())
    half_of_rows = stats.norm.ppf((1 + LEVEL) / 2) * bootstrap_over_rows(differences.mean(axis=0)).standard_error
    over_seeds = interval_over_seeds(differences.mean(axis=1))
    half_of_seeds = 0.0 if over_seeds is None else over_seeds[1] - effect
    half = float(np.hypot(half_of_rows, half_of_seeds))
    return {"effect": effect, "interval": [effect - half, effect + half], "num_seeds": len(seeds)}


def verdict(interval: list[float] | None, num_seeds: int) -> str:
    """Return the verdict on the claim that a difference is above 0. One seed decides nothing."""
    if interval is None:
        return "not run"
    if num_seeds == 1:
        return "undecided (one seed)"
    low, high = interval
    return "confirmed" if low > 0 else "refuted" if high < 0 else "undecided"


def judge(claim: Claim, results: list[dict], by_name: dict[str, Configuration]) -> dict:
    sides = {"better": claim.better, "worse": claim.worse}
    better, worse = (matches(results, *side) for side in sides.values())
    result = difference(
        better,
        worse,
        seedless={side for side, (name, _) in sides.items() if not by_name[name].has_seeds},
        share=claim.share,
    )
    return {
        "claim": claim.text,
        "better": list(claim.better),
        "worse": list(claim.worse),
        "share": claim.share,
        **result,
        "verdict": verdict(result["interval"], result["num_seeds"]),
    }


def kl_and_accuracy(results: list[dict]) -> list[tuple[str, float, float]]:
    """Return (name, response KL, exact match on speech) of all runs that answer speech."""
    return [
        (result["name"], result["alignment"]["response_kl"], result["systems"]["speech"]["exact_match"])
        for result in results
        if "speech" in result["systems"] and "response_kl" in result["alignment"]
    ]


def rank_correlation(points: list[tuple[str, float, float]]) -> dict:
    """Return Spearman's rho of response KL and accuracy over runs with its interval; both None for fewer than four."""
    result: dict = {"spearman": None, "interval": None, "num_runs": len(points)}
    kls, accuracies = (np.array([point[place] for point in points]) for place in (1, 2))
    if len(points) < 4 or np.ptp(kls) == 0 or np.ptp(accuracies) == 0:
        return result | {"verdict": "not run"}
    drawn = np.random.default_rng(0).integers(0, len(points), (NUM_RESAMPLES, len(points)))
    # A resample whose runs are all equal has no ranks.
    drawn = drawn[(np.ptp(kls[drawn], axis=1) > 0) & (np.ptp(accuracies[drawn], axis=1) > 0)]
    ranks = [stats.rankdata(values[drawn], axis=1) for values in (kls, accuracies)]
    resampled = stats.pearsonr(*ranks, axis=1).statistic
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    rho = float(stats.spearmanr(kls, accuracies).statistic)
    # The claim is that rho is below 0.
    return result | {
        "spearman": rho,
        "interval": [float(low), float(high)],
        "verdict": "confirmed" if high < 0 else "refuted" if low > 0 else "undecided",
    }


def analyse(results: list[dict], configurations, claims=CLAIMS) -> dict:
    """Return everything that the report shows.

    Args:
        results: of runs that differ in configuration and seed alone.
    """
    rows = []
    for configuration in configurations:
        own = [result for result in results if result["name"] == configuration.name]
        for system in configuration.systems if own else ():
            of_speech = [result["alignment"] for result in own] if system == "speech" else []
            rows.append(
                {
                    "name": configuration.name,
                    "title": configuration.title,
                    "system": system,
                    **summarise(matches(own, configuration.name, system)),
                    **{name: _mean(of_speech, name) for name in ("response_kl", "input_kl", "token_count_accuracy")},
                    **_mean_groups([result["systems"][system] for result in own]),
                    "exact_transcripts": _mean(own, "exact_transcripts"),
                    "minutes": float(np.mean([result["seconds"]["all"] for result in own])) / 60,
                }
            )
    by_name = {configuration.name: configuration for configuration in configurations}
    points = kl_and_accuracy(results)
    return {
        "systems": rows,
        "claims": [judge(claim, results, by_name) for claim in claims],
        "kl_and_accuracy": {**rank_correlation(points), "runs": points},
        "machines": [
            dict(machine) for machine in sorted({tuple(result["machine"].items()) for result in results}, key=str)
        ],
    }


def _mean(measured: list[dict], name: str) -> float | None:
    values = [measures[name] for measures in measured if name in measures]
    return float(np.mean(values)) if values else None


def _mean_groups(of_runs: list[dict]) -> dict[str, dict[str, float]]:
    """Return means over seeds by kind of question and by kind of voice, if rows have them."""
    return {
        grouping: {group: float(np.mean([run[grouping][group] for run in of_runs])) for group in of_runs[0][grouping]}
        for grouping in ("by_kind", "by_voice_group")
        if grouping in of_runs[0]
    }
