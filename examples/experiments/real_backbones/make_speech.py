"""Manifests of people's and synthetic speech in many voices, to train real backbones on and to test them.

    python -m examples.experiments.real_backbones.make_speech --output DATA --people RECORDINGS/metadata.jsonl \\
        --text novel.txt phrases.txt --synthesizers espeak-ng=8 flite=8 festival=4 kokoro=8 --hours 28 \\
        --held_out piper --assets VOICES

Speech is cached in --output, and a run that was stopped goes on with the same command. Written there, and written again
every few minutes with what is finished:

- train_people.jsonl, choices_people.jsonl, final_people.jsonl: recordings; no speaker is in two of them.
- train_synthetic.jsonl: sentences to repeat, and spoken questions and commands.
- test_synthesizer.jsonl: other sentences and questions by the synthesizers of --held_out, which no other manifest has.
- test_word_times.jsonl: other sentences by espeak-ng, if it is in --synthesizers, with the times of their words.
- refused_*.jsonl: clips that were silent, empty or of an odd length, and why.

Leaves out: noise and rooms, and answers of an LLM, which make_training_data.py adds to these manifests.
"""

import argparse
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

from .people import read_people, split_people, write_people
from .question_kinds import KINDS
from .questions import make_questions
from .rows import deal, write_clips, write_manifest
from .sentences import Sentence, in_turns, is_for_tests, read_sentences
from .synthesizers import SYNTHESIZERS, Espeak, open_synthesizer


def main(arguments: list[str] | None = None):
    options = parse(arguments)
    people: dict[str, list[dict]] = {"train": [], "choices": [], "final": []}
    if options.people:
        people = split_people(read_people(options.people, options.longest_s), options.seed)
        for name, recordings in people.items():
            path = options.output / f"{name}_people.jsonl"
            write_manifest(path, write_people(recordings, options.output, is_training=name == "train"))
    trained, tested = read_texts(options, people)

    held_out = [open_synthesizer(name, options.assets) for name in options.held_out]
    test = tested[: options.num_test_sentences]
    questions = make_questions(True, options.num_test_questions, options.seed, options.kinds)
    if held_out:
        plans = deal(held_out, [*test, *questions], "test", options.seed)
        write_clips(options, "test_synthesizer", plans, is_training=False)
    if Espeak.name in options.shares:
        espeak = [open_synthesizer(Espeak.name)]
        plans = deal(espeak, tested, "times", options.seed)
        write_clips(options, "test_word_times", plans, False, most_rows=options.num_test_sentences, needs_words=True)

    questions = make_questions(False, 10**6, options.seed, options.kinds)
    rows: list[dict] = []
    refused: list[dict] = []
    # Each sentence belongs to one synthesizer: together they say as many different ones as they can.
    for name, share in options.shares.items():
        synthesizer = open_synthesizer(name, options.assets)
        own = [sentence for sentence in trained if owner_of(sentence, options) == name] or trained
        texts = endless(own, questions, options.question_share, f"{name} {options.seed}")
        most = {"most_rows": round(share * options.rows)} if options.rows else {"most_s": share * options.hours * 3600}
        plans = deal([synthesizer], texts, "train", options.seed)
        write_clips(options, "train_synthetic", plans, True, rows, refused, **most)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; `shares` gives the share of each training synthesizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for speech and manifests")
    parser.add_argument("--people", type=Path, help="metadata.jsonl of recordings: file_name, text, speaker, seconds")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="text files or manifests, used in turn")
    parser.add_argument(
        "--synthesizers", nargs="+", required=True, metavar="NAME=SHARE", help=f"of {', '.join(SYNTHESIZERS)}"
    )
    parser.add_argument("--held_out", nargs="*", default=[], metavar="NAME", help="synthesizers for tests alone")
    parser.add_argument("--assets", type=Path, help="folder with kokoro/ and piper/, see README.md")
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument("--hours", type=float, help="of synthetic speech to train on")
    amount.add_argument("--rows", type=int, help="of synthetic speech to train on, instead of --hours")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, metavar="KIND", help="of questions; omitted, all")
    parser.add_argument("--question_share", type=float, default=0.2, help="of the training clips")
    parser.add_argument("--num_test_sentences", type=int, default=300)
    parser.add_argument("--num_test_questions", type=int, default=1000)
    parser.add_argument("--min_words", type=int, default=3)
    parser.add_argument("--max_words", type=int, default=20)
    parser.add_argument("--longest_s", type=float, default=30.0, help="longest clip; Whisper reads 30 s at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes")
    options = parser.parse_args(arguments)
    pairs = [entry.partition("=") for entry in options.synthesizers]
    try:
        shares = {name: float(share or 1) for name, _, share in pairs}
    except ValueError as error:
        parser.error(f"--synthesizers takes NAME=SHARE: {error}.")
    if both := set(shares) & set(options.held_out):
        parser.error(f"{', '.join(sorted(both))} cannot be both in --synthesizers and in --held_out.")
    if min(shares.values()) <= 0:
        parser.error("The shares of --synthesizers are to be above 0.")
    if not options.text and not options.people:
        parser.error("There is nothing to say: give --text or --people.")
    options.shares = {name: share / sum(shares.values()) for name, share in shares.items()}
    return options


def read_texts(options, people: dict[str, list[dict]]) -> tuple[list[Sentence], list[Sentence]]:
    """Return the sentences to train on and those for tests: none is in both, and no held-out speaker says one."""
    sources = []
    for path in options.text:
        sentences, refused = read_sentences(path, options.min_words, options.max_words)
        print(f"{path}: {len(sentences)} sentences; refused: {dict(refused)}")
        sources.append(sentences)
    spoken = {row["text"]: Sentence(f"{row['text'].capitalize()}.", row["text"]) for row in people["train"]}
    lengths = range(options.min_words, options.max_words + 1)
    sources.append([sentence for text, sentence in spoken.items() if len(text.split()) in lengths])
    held_out = {row["text"] for name in ("choices", "final") for row in people[name]}
    dealt = in_turns(sources, random.Random(f"sentences {options.seed}"))
    different = list({entry.text: entry for entry in reversed(dealt) if entry.text not in held_out}.values())[::-1]
    trained = [sentence for sentence in different if not is_for_tests(sentence.text)]
    tested = [sentence for sentence in different if is_for_tests(sentence.text) and sentence.text not in spoken]
    print(f"{len(trained)} sentences to train on, {len(tested)} for tests")
    if not trained:
        raise ValueError("No sentence is left to train on. Give more --text.")
    return trained, tested


def owner_of(sentence: Sentence, options) -> str:
    """Return the synthesizer that says a sentence, drawn by its text."""
    return random.Random(f"owner {options.seed} {sentence.text}").choice(list(options.shares))


def endless(sentences: list[Sentence], questions: list[Sentence], share: float, key: str) -> Iterator[Sentence]:
    """Yield sentences without end, and a question in their place at a rate of `share`; `key` draws places and order."""
    rng = random.Random(key)
    turns = itertools.cycle(sentences)
    asked = itertools.cycle(random.Random(f"questions {key}").sample(questions, len(questions)))
    while True:
        yield next(asked) if rng.random() < share else next(turns)


if __name__ == "__main__":
    main()
