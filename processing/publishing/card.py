"""A model card from facts: `card_template.md`, with its metadata and its marked blocks filled in.

Prose outside the blocks is the same for every model. A fact that is None is called "not measured", "not stated" or "not
recorded". `metadata.py` makes the front matter; `facts.py` and `verify.py` find the facts.
"""

import re
import textwrap
from pathlib import Path

from huggingface_hub import ModelCard

from modeling_blsp_kd.backbone_names import described
from modeling_blsp_kd.training.card import name_losses

from .metadata import VOICES, is_hub_id, metadata_of

# Its front matter gives the order of the metadata.
TEMPLATE = Path(__file__).with_name("card_template.md")
TINY_WORLD = "tiny world"
SIZES = {"float32": 4, "bfloat16": 2}  # bytes of a number
BLOCK = re.compile(r"<!-- (?P<name>[\w ]+) -->\n.*?\n?<!-- /(?P=name) -->", re.DOTALL)


def make_card(facts: dict, template: str | None = None) -> ModelCard:
    """Return the card of a model.

    Args:
        facts: `name` (repository id or folder name), `parts` (of [`describe_parts`]), `thin` (bool), `memory` (dict of
            `dtype`, `peak_mb`, `before_mb` and `clip_s`, or None), `results` (dict as in `results.json`; what was
            not measured is absent), `losses` (name -> weight, from the config), `samples` (list of dict with `audio`,
            `instruction`, `text`, `answer` and `output`, what the model says), `licence`, `languages` and `datasets`
            (None or empty if not stated); of a thin model `other_revisions`, see [`other_revisions`].
        template: Markdown with blocks `<!-- name --> ... <!-- /name -->`. Omitted: `card_template.md`.

    Raises:
        ValueError: the template lacks a block, or has one that is not known.
    """
    template = TEMPLATE.read_text() if template is None else template
    blocks = {
        "title": f"# {facts['name']}",
        "model": _model(facts),
        "model id": f'```python\nMODEL = "{facts["name"]}"  # this repository, or a folder with its files\n```',
        "training": _training(facts),
        "results": _results(facts["results"]),
        "samples": _samples(facts["samples"]),
        "licence": _licence(facts),
    }
    found = [match["name"] for match in BLOCK.finditer(template)]
    if sorted(found) != sorted(blocks):
        raise ValueError(f"The template must have each block of {sorted(blocks)} once, but has {sorted(found)}.")
    card = ModelCard(BLOCK.sub(lambda match: _block(match["name"], blocks[match["name"]]), template))
    card.data = metadata_of(facts)
    return card


def _block(name: str, text: str) -> str:
    return f"<!-- {name} -->\n{text}\n<!-- /{name} -->"


def _model(facts: dict) -> str:
    parts = facts["parts"]
    total, trained = (sum(part[key] for part in parts) for key in ("parameters", "trained"))
    lines = ["| part | what | made from | parameters | of these trained |", "|---|---|---|---|---|"]
    for part in parts:
        origin = "new" if part["name"] in ("adapter", "partial LoRA") else _link(part["base_model"]) or "not recorded"
        numbers = f"{_count(part['parameters'])} | {_count(part['trained'])}"
        lines.append(f"| {part['name']} | {part['what']} | {origin} | {numbers} |")
    lines.append(f"| all | | | {_count(total)} | {_count(trained)} |")
    sizes = ", ".join(f"{_megabytes(size * total / 1e6)} in {dtype}" for dtype, size in SIZES.items())
    memory, in_use = facts["memory"], "Memory in use: not measured."
    if memory is not None:
        in_use = (
            f"A process that loads the model in {memory['dtype']} on the CPU and answers a clip of "
            f"{memory['clip_s']:.1f} s peaks at {_megabytes(memory['peak_mb'])} of resident memory (Linux's VmHWM); "
            f"{_megabytes(memory['before_mb'])} of these are Python and its packages, before anything is loaded."
        )
    lines += ["", _paragraph(f"The weights of all parts take {sizes}. {in_use}")]
    return "\n".join([*lines, *_thin(facts)] if facts["thin"] else lines)


def _thin(facts: dict) -> list[str]:
    """Return paragraphs on the base models that a thin checkpoint fetches."""
    lines = [
        "",
        _paragraph(
            "The weights here are what was trained; loading fetches the base models from their repositories. If you "
            'have them in folders, pass `backbones={"audio_tower": FOLDER, "language_model": FOLDER}` to '
            "`from_pretrained`, or in `model_kwargs` to `pipeline`. If they are another revision than in training, a "
            "warning names both."
        ),
        *("", "| base model | revision in training |", "|---|---|"),
    ]
    for part in facts["parts"]:
        if revision := part.get("trained_revision"):
            lines.append(f"| {_link(part['base_model']) or part['name']} | {described(revision)} |")
    for part, revision in (facts.get("other_revisions") or {}).items():
        text = f"The examples here were answered with another {part} than in training, {described(revision)}."
        lines += ["", _paragraph(text)]
    return lines


def _training(facts: dict) -> str:
    results = facts["results"]
    training = results.get("training")
    if training is None:
        return "Data and settings: not recorded."
    settings = {
        **_settings(training),
        "losses and temperature": name_losses(facts["losses"]),
        "seed": training["seed"],
        "time": f"{results['train_seconds']:.0f} s on {training['device']}",
        "versions": ", ".join(f"{name} {version}" for name, version in training["versions"].items()),
    }
    lines = [f"| {name} | {value} |" for name, value in settings.items()]
    described = [*_before(training), _paragraph(_data(training["data"])), ""]
    return "\n".join([*described, "| setting | value |", "|---|---|", *lines])


def _before(training: dict) -> list[str]:
    """Return paragraphs on the stages before the last."""
    before, model = training.get("before", []), _link(training.get("started_from")) or "a model"
    if before is None:
        return [_paragraph(f"Trained further from {model}; what that was trained on is not recorded. After that:"), ""]
    lines = []
    for number, stage in enumerate(before, start=1):
        settings = "; ".join(f"{name} {value}" for name, value in _settings(stage).items())
        lines += [_paragraph(f"Stage {number}: {_data(stage['data'])} In figures: {settings}."), ""]
    return [*lines, f"Stage {len(before) + 1}, the last:", ""] if before else []


def _data(data: dict) -> str:
    voices = f" in {data['voices']} voices" if data["voices"] else ""
    if data["source"] == TINY_WORLD:
        return (
            f"{data['rows']:,} utterances synthesised with espeak-ng{voices}, from sentences of five kinds (movements, "
            "possessions, opinions, sums, strings of digits) of a closed world of some hundred English words, each "
            "with one of 16 kinds of instruction. The responses are the LLM's own greedy answers to the transcript. No "
            "human speech, no personal data. The model knows the words of its world and no others, and has heard a "
            "synthesiser in quiet: it is for study only."
        )
    return f"{data['rows']:,} utterances{voices} of the manifest `{data['source']}`."


def _settings(training: dict) -> dict[str, str]:
    encoder_rate = training["encoder_learning_rate"]
    encoder = "encoder frozen" if encoder_rate is None else f"{encoder_rate:g} for the encoder"
    share, kept = training.get("on_policy_share"), training.get("kept_teacher")
    return {
        **({"own answers": f"{share:.0%} of the rows with audio in each step"} if share else {}),
        **({"teacher on disk": f"{kept['name'] or 'not named'}, {kept['k']} tokens each"} if kept else {}),
        "steps": f"{training['steps']:,} of {training['batch_size']} utterances",
        "learning rate": f"{training['learning_rate']:g}, {encoder}; {training['schedule']} after "
        f"{training['warmup_steps']} steps of warmup",
    }


def _results(results: dict) -> str:
    text, speech = results.get("text_accuracy"), results.get("speech_accuracy")
    parts_measured = {
        "token_count_accuracy": "share of clips with as many speech tokens as the transcript has tokens",
        "response_kl": "KL of the response tokens, nats per token at the training temperature",
        "input_kl": "KL of the content tokens, likewise",
    }
    measured = [f"- {described}: {results[name]:.3f}" for name, described in parts_measured.items() if name in results]
    if not text or not speech:
        return "\n".join(["Answers were not scored.", "", *measured]) if measured else "Not measured."
    evaluation = (results.get("training") or {}).get("evaluation")
    num_scored = results.get("num_scored", (evaluation or {}).get("rows"))
    count = f"{num_scored:,} questions" if num_scored else "Questions (their number was not recorded)"
    rows = {described: (text[name], speech[name]) for name, described in VOICES.items() if name in speech}
    by_kind = speech["by_kind"]
    if len(by_kind) > 1:
        weakest = min(by_kind, key=by_kind.get)
        rows[f"weakest kind of question: {weakest}"] = (text["by_kind"][weakest], by_kind[weakest])
    lines = [
        _paragraph(
            f"{count} on clips that were not trained on, scored by exact match of the whole answer. The LLM on the "
            "transcript is the upper bound of the model on speech."
        ),
        *("", "| | LLM on the transcript | model on speech |", "|---|---|---|"),
        *(f"| {described} | {upper:.3f} | {reached:.3f} |" for described, (upper, reached) in rows.items()),
    ]
    return "\n".join([*lines, "", *measured, "- one training run, one seed"])


def _samples(samples: list[dict]) -> str:
    if not samples:
        return "None are published with this model."
    lines = ["| clip | what is said | instruction | the model answers | right answer |", "|---|---|---|---|---|"]
    for sample in samples:
        said, answer = sample.get("text") or "not stated", sample.get("answer") or "not stated"
        cells = (f"`{sample['audio']}`", said, sample["instruction"] or "none", sample["output"], answer)
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    return "\n".join(lines)


def _licence(facts: dict) -> str:
    lines = ["| part | licence |", "|---|---|", "| code | apache-2.0 |"]
    lines.append(f"| weights in this repository | {facts['licence'] or 'not stated'} |")
    for part in facts["parts"]:
        if part["base_model"] or part["name"] in ("speech encoder", "LLM"):
            name = f"base model of the {part['name']}: {_link(part['base_model']) or 'not recorded'}"
            lines.append(f"| {name} | {part['licence'] or 'not stated'} |")
    datasets = ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in facts["datasets"] or [])
    if datasets:
        lines.append(f"| training data: {datasets} | see there |")
    return "\n".join(lines)


def _link(name: str | None) -> str | None:
    if name is None:
        return None
    return f"[{name}](https://huggingface.co/{name})" if is_hub_id(name) else f"`{name}`"


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _cell(text: str) -> str:
    """Return text that stays in its cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def _count(number: int) -> str:
    if number >= 1e9:
        return f"{number / 1e9:.2f} B"
    return f"{number / 1e6:.2f} M" if number >= 1e4 else str(number)


def _megabytes(number: float) -> str:
    return f"{number / 1e3:.1f} GB" if number >= 1e4 else f"{number:.1f} MB" if number < 10 else f"{number:.0f} MB"
