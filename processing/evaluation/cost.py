"""What an answer costs each system: the parameters that run, and the time from the clip to the first token.

The systems take turns, row by row, so that a slow moment of the machine meets all of them. Leaves out: memory, and the
decoding of audio files, which all systems that hear have in common.
"""

import time
from collections.abc import Iterable

from torch import nn

from processing.audio_loading import load_audio
from processing.spoken_inputs import user_turn

from .answering import answer
from .systems import Systems


def measure_cost(systems: Systems, names: Iterable[str], rows: list[dict]) -> dict[str, dict]:
    """Measure the cost of some systems on rows, one row at a time.

    Returns:
        of each system `num_parameters`, those that run at least once for an answer, and `first_token_ms`, one number
        per row: features, encoder, recogniser and LLM, up to the first token of the answer.
    """
    rate = systems.processor.feature_extractor.sampling_rate
    clips = [{"array": load_audio(row["audio"], rate), "sampling_rate": rate} for row in rows]
    names = list(names)
    times_ms: dict[str, list[float]] = {}
    for number, (row, clip) in enumerate(zip([rows[0], *rows], [clips[0], *clips])):
        for name in names:
            start = time.perf_counter()
            answer_first_token(systems, name, {**row, "audio": clip})
            if number > 0:  # the first turn also loads kernels
                times_ms.setdefault(name, []).append(1000 * (time.perf_counter() - start))
    return {
        name: {"num_parameters": count_run(systems, name), "first_token_ms": times} for name, times in times_ms.items()
    }


def answer_first_token(systems: Systems, name: str, row: dict) -> str:
    """Return the first token of what a system answers to a row whose clip is decoded."""
    instruction, content = row.get("instruction"), {"type": "text", "text": row["text"]}
    if name == "speech":
        content = {"type": "audio", "audio": row["audio"]}
    elif name == "blind":
        instruction, content = None, {"type": "text", "text": instruction or ""}
    elif name in systems.recognizers:
        [transcript] = systems.recognizers[name]([row["audio"]])
        content = {"type": "text", "text": transcript}
    [first] = answer(systems.model, systems.processor, [user_turn(instruction, content)], 1, batch_size=1)
    return first


def count_run(systems: Systems, name: str) -> int:
    """Count the parameters that run in a system."""
    parameters: list[nn.Parameter] = []
    if name == "speech":
        parameters += systems.model.parameters()
    else:  # partial LoRA is off where there is no audio
        ours = set() if systems.model.plora is None else set(map(id, systems.model.plora.parameters))
        parameters += [each for each in systems.model.language_model.parameters() if id(each) not in ours]
    if name in systems.recognizers:
        parameters += systems.recognizers[name].model.parameters()
    return sum({id(parameter): parameter.numel() for parameter in parameters}.values())
