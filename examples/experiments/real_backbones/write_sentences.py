"""Let the LLM write sentences, questions and commands that synthesizers say afterwards.

    python -m examples.experiments.real_backbones.write_sentences --text_model LLM --topics TEXT/wordnet_examples.txt \\
        --num 20000 --output TEXT/written.txt

Each is about a word of the files of --topics. The output is a text file for make_speech.py, one paragraph for each, and
a run that was stopped goes on with the same command. What an LLM says often is in it once: make_speech.py reads each
sentence once.
"""

import argparse
import random
import re
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from processing.response_generation.engines import TransformersEngine
from processing.response_generation.generation import text_processor
from processing.response_generation.options import AnswerOptions
from processing.spoken_inputs import user_turn

from .sentences import plain_words

# Most of it plain sentences: they have the widest vocabulary.
REQUESTS = (
    "Write one short sentence with the word {topic}.",
    "Write one short sentence that somebody might say about {topic}.",
    "Ask one short question about {topic}.",
    "Give one short command that has to do with {topic}.",
)
END = "\n\n"


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text_model", required=True, help="Hub id or folder of the LLM")
    parser.add_argument("--topics", type=Path, nargs="+", required=True, help="text files, of which words are drawn")
    parser.add_argument("--output", type=Path, required=True, help="text file")
    parser.add_argument("--num", type=int, default=10_000, help="sentences")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top_p", type=float, default=1.0, help="below 1 each token takes a sort, which is slow")
    parser.add_argument("--max_new_tokens", type=int, default=32, help="longer ones are cut, and then left out")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--dtype", default="auto", help="of the LLM's weights; auto: as they are stored")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    answering = AnswerOptions(options.text_model, max_new_tokens=options.max_new_tokens)
    processor = text_processor(answering)
    engine = TransformersEngine(
        options.text_model,
        processor,
        "cpu",
        options.dtype,
        options.batch_size,
        options.max_new_tokens,
        options.temperature,
        options.top_p,
    )
    topics = read_topics(options.topics)
    num_done = count_and_repair(options.output)
    with (
        options.output.open("a", encoding="utf-8") as file,
        tqdm(total=options.num, initial=num_done, desc="sentences", mininterval=5) as progress,
    ):
        for start in range(num_done, options.num, options.batch_size):
            numbers = range(start, min(start + options.batch_size, options.num))
            requests = [request_of(number, topics, options.seed) for number in numbers]
            chats = [user_turn(None, {"type": "text", "text": request}) for request in requests]
            prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
            prompt_ids = processor.tokenize(prompts, add_special_tokens=False)["input_ids"]
            answers = engine.answer(prompt_ids, [options.seed * 10**9 + number for number in numbers])
            # An answer that was cut has an empty paragraph, so that paragraphs can be counted.
            texts = [" ".join(answer.text.split()) if answer.is_finished else "-" for answer in answers]
            file.write("".join(f"{text or '-'}{END}" for text in texts))
            file.flush()
            progress.update(len(numbers))


def read_topics(paths: Iterable[Path]) -> list[str]:
    """Return the different words of text files, of four letters or more, in the order of the alphabet."""
    words = {word for path in paths for word in plain_words(path.read_text(encoding="utf-8", errors="replace"))}
    topics = sorted(word for word in words if re.fullmatch("[a-z]{4,}", word))
    if not topics:
        raise ValueError(f"There is no word of four letters or more in {', '.join(map(str, paths))}.")
    return topics


def request_of(number: int, topics: list[str], seed: int) -> str:
    """Return what the LLM is asked for sentence `number`, which depends on nothing else."""
    rng = random.Random(f"{seed} {number}")
    return rng.choice(REQUESTS).format(topic=rng.choice(topics))


def count_and_repair(output: Path) -> int:
    """Return how many sentences a text file has, and cut off one that was not finished."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if not output.exists():
        return 0
    text = output.read_text(encoding="utf-8")
    whole = text[: text.rfind(END) + len(END)] if END in text else ""
    output.write_text(whole, encoding="utf-8")
    return whole.count(END)


if __name__ == "__main__":
    main()
