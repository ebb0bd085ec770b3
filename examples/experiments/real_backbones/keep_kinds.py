"""Which kinds of questions the LLM answers from text: those to compare speech with text on.

    python -m examples.experiments.real_backbones.keep_kinds --model MODEL --output OUTPUT

MODEL is any BLSP-KD model around the LLM, trained or not: it reads text as the LLM does. Leaves in OUTPUT
`kept_kinds.json` and the answers; a run that was stopped goes on. The copy of it beside this script is what
`evaluate_all` asks. Leaves out: speech.
"""

import argparse
import json
from pathlib import Path

from tqdm import tqdm

from modeling_blsp_kd import BlspKdForCausalLM
from modeling_blsp_kd.backbone_names import identify
from modeling_blsp_kd.devices import fast_dtype
from processing import BlspKdProcessor
from processing.evaluation.predictions import Predictions, predict_missing
from processing.evaluation.scoring import Scorer
from processing.evaluation.systems import Systems

from .questions import make_questions

KEPT_KINDS = Path(__file__).with_name("kept_kinds.json")


def main(arguments: list[str] | None = None):
    options = parse(arguments)
    questions = make_questions(True, options.num_questions, options.seed)
    rows = [{"id": each.text, "text": each.text, "audio": None, **dict(each.labels)} for each in questions]
    settings = {
        "model": identify(options.model, {})["revision"],
        **{name: getattr(options, name) for name in ("max_new_tokens", "instruction", "dtype")},
    }
    if options.instruction:
        rows = [{**row, "instruction": options.instruction} for row in rows]
    file = Predictions(options.output / "predictions", "text", settings)
    systems = Systems(
        BlspKdForCausalLM.from_pretrained(options.model, dtype=fast_dtype(options.dtype)),
        BlspKdProcessor.from_pretrained(options.model),
        tasks=("answers",),
        max_new_tokens=options.max_new_tokens,
    )
    for start in tqdm(range(0, len(rows), options.batch_size), mininterval=1):
        predict_missing(systems, {"text": file}, rows[start : start + options.batch_size])
    kinds = choose([file.by_id[row["id"]] for row in rows], options.least)
    told = {"num_questions": len(rows), **settings, "least": options.least}
    (options.output / KEPT_KINDS.name).write_text(json.dumps({"settings": told, "kinds": kinds}, indent=1) + "\n")
    for kind, measured in sorted(kinds.items(), key=lambda item: -item[1]["contained"]):
        print(f"{measured['contained']:6.2f} {measured['n']:4} {'kept' if measured['is_kept'] else '    '} {kind}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a BLSP-KD model")
    parser.add_argument("--output", type=Path, required=True, help="folder for answers and kinds")
    parser.add_argument("--num_questions", type=int, default=1000, help="test questions, the kinds in turn")
    parser.add_argument("--seed", type=int, default=0, help="of make_speech")
    parser.add_argument("--instruction", help="asked before each question; omitted, none, as in the manifests")
    parser.add_argument("--least", type=float, default=0.5, help="keep kinds with a larger share of right answers")
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--dtype", help="of the model; omitted, float32 on a CPU")
    return parser.parse_args(arguments)


def choose(lines: list[dict], least: float) -> dict[str, dict]:
    """Return for each kind the share of answers that hold the right one, their number, and whether it is kept."""
    [scores] = Scorer(("answers",), num_resamples=1, normalizer="english")({"text": lines}).values()
    return {
        kind: {"contained": round(of["contained"]["value"], 3), "n": of["contained"]["n"],
               "is_kept": of["contained"]["value"] > least}
        for kind, of in scores["answers"]["by_kind"].items()
    }  # fmt: skip


def read_kept(path: Path = KEPT_KINDS) -> list[str]:
    """Return the kinds that a file says are kept."""
    return [kind for kind, measured in json.loads(path.read_text())["kinds"].items() if measured["is_kept"]]


if __name__ == "__main__":
    main()
