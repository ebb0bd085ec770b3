"""What answers cost the systems, and whether text-only behaviour is that of the original LLM."""

import pytest
import torch

from processing.evaluation import cost
from processing.evaluation.cost import count_run, measure_cost
from processing.evaluation.original_llm import compare_with_original
from processing.evaluation.recognition import Recognizer
from processing.evaluation.systems import Systems
from tests.helpers.models import base_llm, make_model
from tests.helpers.prompts import SAMPLING_RATE, clip

ROWS = [
    {"audio": {"array": clip(0.6, seed=seed), "sampling_rate": SAMPLING_RATE}, "text": text, "instruction": "repeat"}
    for seed, text in enumerate(["the red cat", "ran", "the cat ran to the river"])
]


@pytest.fixture
def model():
    return make_model(plora={"lora_dropout": 0.0})


def test_parameters_that_run_are_counted_once(model, processor):
    recognizer = Recognizer(lambda clips: ["cat"] * len(clips), torch.nn.Linear(3, 4))
    systems = Systems(model, processor, recognizer={"cascade_a": recognizer})
    llm = base_llm(model).num_parameters()
    assert count_run(systems, "text") == count_run(systems, "blind") == llm
    assert count_run(systems, "cascade_a") == llm + 16
    assert count_run(systems, "speech") == sum(parameter.numel() for parameter in model.parameters()) > llm
    assert count_run(Systems(model, processor), "cascade") == count_run(systems, "speech")


def test_systems_take_turns_and_the_first_turn_is_not_timed(model, processor, monkeypatch):
    turns = []
    monkeypatch.setattr(cost, "answer_first_token", lambda systems, name, row: turns.append((name, row["text"])))
    times = measure_cost(Systems(model, processor), ["speech", "cascade"], ROWS)
    texts = [ROWS[0]["text"], *(row["text"] for row in ROWS)]
    assert turns == [(name, text) for text in texts for name in ("speech", "cascade")]
    assert {name: len(of["first_token_ms"]) for name, of in times.items()} == {"speech": 3, "cascade": 3}


def test_the_first_token_is_that_of_the_whole_answer(model, processor):
    systems = Systems(model, processor, tasks=("answers",), max_new_tokens=1, recognizer=lambda clips: ["the cat"])
    for name in ("text", "speech", "blind", "cascade"):
        [line] = systems.predict(name, [{**ROWS[0], "id": "1", "answer": "x"}])
        assert cost.answer_first_token(systems, name, ROWS[0]) == line["predicted"]["answers"]


def test_text_only_behaviour_is_that_of_the_original_until_a_weight_moves(model, processor):
    original = base_llm(model)
    same = compare_with_original(model, processor, original, ROWS, max_new_tokens=4, batch_size=2)
    assert same == {"num_prompts": 3, "same_logits": 3, "same_answers": 3, "largest_difference": 0.0}
    with torch.no_grad():
        original.get_output_embeddings().weight[5] += 0.1
    other = compare_with_original(model, processor, original, ROWS, max_new_tokens=4, batch_size=2)
    assert other["same_logits"] < 3 and other["largest_difference"] > 0
