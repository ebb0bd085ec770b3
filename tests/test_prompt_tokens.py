"""Token ids of prompts are those of the whole text, whatever the LLM's tokenizer writes at borders."""

import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from processing import BlspKdDataCollator, BlspKdProcessor
from processing.data_collator import continue_ids, split_prompt
from tests.helpers.prompts import clip, make_tokenizer

AUDIO = "<|audio|>"
CORPUS = [
    "The red cat ran to the river, and back again. Repeat the words: 12 345 cats!",
    "[INST] What is it? [/INST] the cat. USER: hello ASSISTANT: yes",
] * 3
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def sentencepiece(legacy: bool) -> LlamaTokenizer:
    """Llama's: SentencePiece BPE over whole lines, with bytes for what it does not know."""
    vocab = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", "<pad>"])}
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    merges = []
    for character in sorted(set("▁" + "".join(CORPUS)) - {" "}):
        vocab.setdefault(character, len(vocab))
    for word in dict.fromkeys(" ".join(CORPUS).split()):
        for piece in (word, f"▁{word}"):  # the same word within a line and at its start
            for stop in range(1, len(piece)):
                vocab.setdefault(piece[: stop + 1], len(vocab))
                if (piece[:stop], piece[stop]) not in merges:
                    merges.append((piece[:stop], piece[stop]))
    return LlamaTokenizer(vocab=vocab, merges=merges, legacy=legacy, **SPECIAL)


def with_prepended_blank() -> PreTrainedTokenizerFast:
    """Llama 2's as its tokenizer.json has it: a normaliser writes the "▁"."""
    backend = json.loads(sentencepiece(legacy=True).backend_tokenizer.to_str())
    backend["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(backend))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def trained(model, trainer_class, pre_tokenizer, decoder, **options) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    special = list(SPECIAL.values())
    tokenizer.train_from_iterator(
        CORPUS, trainer_class(vocab_size=400, special_tokens=special, show_progress=False, **options)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def unigram(scheme="always") -> PreTrainedTokenizerFast:
    metaspace = {"replacement": "▁", "prepend_scheme": scheme}
    return trained(
        models.Unigram(),
        trainers.UnigramTrainer,
        pre_tokenizers.Metaspace(**metaspace),
        decoders.Metaspace(**metaspace),
        unk_token="<unk>",
        initial_alphabet=[chr(code) for code in range(33, 127)] + ["\n"],
    )


def wordpiece() -> PreTrainedTokenizerFast:
    return trained(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer,
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
        initial_alphabet=[chr(code) for code in range(33, 127)],
    )


def byte_level_that_joins_line_breaks() -> PreTrainedTokenizerFast:
    """Like Llama 3's and Qwen's, which join a line break with the punctuation before it."""
    split = pre_tokenizers.Split(Regex(r"\s?[^\s\w]+\n*|\s?\w+|\s+"), behavior="isolated")
    tokenizer = trained(
        models.BPE(),
        trainers.BpeTrainer,
        pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
        decoders.ByteLevel(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["model"]["vocab"][".Ċ"] = len(backend["model"]["vocab"])
    backend["model"]["merges"].append([".", "Ċ"])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), **SPECIAL)


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


TOKENIZERS = {
    "SentencePiece BPE": lambda: sentencepiece(legacy=False),
    "SentencePiece BPE, legacy": lambda: sentencepiece(legacy=True),
    "SentencePiece BPE, prepended": with_prepended_blank,
    "Unigram, always": unigram,
    "Unigram, first": lambda: unigram("first"),
    "WordPiece": wordpiece,
    "byte-level BPE": byte_level,
    "byte-level BPE, line breaks": byte_level_that_joins_line_breaks,
}
TEMPLATES = {
    "none": None,
    "mistral v1": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ ' ' ~ m.content ~ eos_token }}{% endif %}{% endfor %}",
    "plain words": "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}"
    "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "special tokens": "{% for m in messages %}<s>{{ m.role }}{{ '\n' }}{{ m.content }}</s>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant{{ '\n' }}{% endif %}",
}
INSTRUCTIONS = [None, "Repeat the words:", "What is it?"]
TEXTS = ["the red cat", "The cat ran.", "345 cats!", "“hello” 🐈", "a", ", and back", "  the river \n"]


def blank_after_audio(kind: str, suffix: str) -> bool:
    """Return whether a tokenizer puts a "▁" after the placeholder, as after other special tokens, before `suffix`."""
    if suffix.startswith("<"):  # the next special token
        return False
    if kind in ("SentencePiece BPE, legacy", "Unigram, always"):
        return not suffix.startswith(" ")
    return kind == "SentencePiece BPE, prepended"


@pytest.fixture(scope="module")
def processor_of(tmp_path_factory, backbones):
    made = {}

    def make(kind, template) -> BlspKdProcessor:
        if (kind, template) not in made:
            folder = tmp_path_factory.mktemp("llm")
            tokenizer = TOKENIZERS[kind]()
            tokenizer.chat_template = TEMPLATES[template]
            tokenizer.save_pretrained(folder)
            if kind == "SentencePiece BPE, legacy":  # which transformers does not save
                config = json.loads((folder / "tokenizer_config.json").read_text())
                (folder / "tokenizer_config.json").write_text(json.dumps({**config, "legacy": True}))
            made[kind, template] = BlspKdProcessor.from_backbones(backbones[0], folder)
        return made[kind, template]

    return make


@pytest.fixture(params=TOKENIZERS)
def kind(request):
    return request.param


@pytest.fixture(params=TEMPLATES)
def template(request):
    return request.param


def make_rows():
    return [
        {"audio": (clip(0.1), 16_000), "text": text, "instruction": instruction, "response": response}
        for instruction in INSTRUCTIONS
        for text, response in zip(TEXTS, ["the cat", "Yes.", "12", "“a”", "🐈", ", back", " it "])
    ]


def parts_of(batch, index):
    """Student, teacher, labels of a row without padding, and where its content is in the teacher's."""
    student = batch["input_ids"][index][batch["attention_mask"][index].bool()].tolist()
    teacher = batch["teacher_input_ids"][index][batch["teacher_attention_mask"][index].bool()].tolist()
    labels = [label for label in batch["labels"][index].tolist() if label != -100]
    content = batch["teacher_is_content"][index].nonzero().flatten().tolist()
    return student, teacher, labels, content


def test_the_student_reads_in_training_what_it_reads_at_inference(processor_of, kind, template):
    """Without a chat template SentencePiece tokenizers wrote a "▁" into the training prompt that inference lacks."""
    processor, rows = processor_of(kind, template), make_rows()
    batch = BlspKdDataCollator(processor)(rows)
    for index, row in enumerate(rows):
        student, teacher, labels, content = parts_of(batch, index)
        prefix, suffix, response = split_prompt(processor, row["instruction"], row["response"].strip())
        prompt = processor(f"{prefix}{AUDIO}{suffix}", row["audio"], add_special_tokens=False)["input_ids"][0].tolist()
        assert student == prompt + labels
        place = student.index(processor.audio_token_id)
        assert content == list(range(place, place + len(content))) and len(content) > 0
        assert teacher == student[:place] + teacher[place : place + len(content)] + student[place + 1 :]
        assert int(batch["num_speech_tokens"][index]) == len(content)
        assert len(teacher) == len(student) - 1 + len(content)


def test_a_saved_processor_reads_the_same_ids(processor_of, kind, template, tmp_path):
    """transformers leaves `legacy` out when it saves a Llama tokenizer: what was trained read other ids afterwards."""
    processor, rows = processor_of(kind, template), make_rows()
    before = BlspKdDataCollator(processor)(rows)
    for stage in ("first", "second"):
        processor.save_pretrained(tmp_path / stage)
        processor = BlspKdProcessor.from_pretrained(tmp_path / stage)
        after = BlspKdDataCollator(processor)(rows)
        assert all(torch.equal(values, after[name]) for name, values in before.items())


def test_ids_are_those_of_the_whole_text(processor_of, kind, template):
    """Pieces that were tokenised alone began with a "▁" each, which the LLM does not read in the same text."""
    processor, rows = processor_of(kind, template), make_rows()
    tokenizer = processor.tokenizer
    batch = BlspKdDataCollator(processor)(rows)
    num_whole = num_blanks = 0
    for index, row in enumerate(rows):
        _, teacher, labels, content = parts_of(batch, index)
        prefix, suffix, response = split_prompt(processor, row["instruction"], row["response"].strip())
        text = row["text"].strip()
        whole = tokenizer(f"{prefix}{text}{suffix}{response}", add_special_tokens=False, return_offsets_mapping=True)
        start, stop = len(prefix), len(prefix) + len(text)
        borders = {start, stop, stop + len(suffix)}
        crosses = any(first < border < last for first, last in whole["offset_mapping"] for border in borders)
        if blank_after_audio(kind, suffix):
            num_blanks += 1
            assert tokenizer.convert_ids_to_tokens(teacher[content[-1] + 1]).startswith("▁")
            continue  # teacher and student read the blank that the prompt has at inference
        if crosses:
            assert template in ("mistral v1", "plain words", "none")
            continue
        num_whole += 1
        assert teacher == whole["input_ids"]
        found = [
            place
            for place, (first, last) in enumerate(whole["offset_mapping"])
            if start <= first < stop and first < last <= stop
        ]
        assert found == content
    assert num_whole or num_blanks == len(rows)


def test_texts_read_the_same_however_tokens_are_cut(processor_of, kind, template):
    """If the tokenizer would join tokens over a border, the ids differ from the whole's, but not what they say."""
    if kind == "WordPiece":
        pytest.skip("its decoder does not give white space back")
    processor, rows = processor_of(kind, template), make_rows()
    batch = BlspKdDataCollator(processor)(rows)
    for index, row in enumerate(rows):
        _, teacher, _, content = parts_of(batch, index)
        prefix, suffix, response = split_prompt(processor, row["instruction"], row["response"].strip())
        ids = processor.tokenizer(prefix + row["text"].strip(), add_special_tokens=False)["input_ids"]
        decode = processor.tokenizer.decode
        assert decode(teacher[: content[-1] + 1]) == decode(ids)


def test_a_blank_that_stands_before_the_content_is_not_doubled(processor_of):
    """After `[INST] ` the content began with a second blank."""
    for kind in ("SentencePiece BPE", "SentencePiece BPE, legacy", "SentencePiece BPE, prepended"):
        processor = processor_of(kind, "mistral v1")
        batch = BlspKdDataCollator(processor)([{**make_rows()[0], "instruction": None}])
        _, teacher, _, content = parts_of(batch, 0)
        tokens = processor.tokenizer.convert_ids_to_tokens(teacher)
        assert tokens[content[0] - 1] == "▁" and not tokens[content[0]].startswith("▁")
        assert tokens[content[0] + 1].startswith("▁")


# -- trained checkpoints keep their meaning ----------------------------------------------------------------------------


def alone(processor, row) -> tuple[list[int], list[int]]:
    """Teacher and student of a row as they were before: four pieces, each tokenised alone."""
    prefix, suffix, response = split_prompt(processor, row["instruction"], row["response"])
    pieces = processor.tokenizer([prefix, row["text"], suffix, response], add_special_tokens=False)["input_ids"]
    before, content, after, answer = pieces
    return [*before, *content, *after, *answer], [*before, processor.audio_token_id, *after, *answer]


TINY_LLM = Path(__file__).parents[1] / "examples" / "tiny_world" / "llm"


def smollm2_like(folder) -> Path:
    """SmolLM2's kind: digits one by one, GPT-2's bytes, ChatML."""
    tokenizer = trained(
        models.BPE(),
        trainers.BpeTrainer,
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        decoders.ByteLevel(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.chat_template = TEMPLATES["special tokens"]
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("llm", ["tiny world", "smollm2"])
def test_byte_level_ids_are_what_they_were(backbones, tmp_path, llm):
    folder = TINY_LLM if llm == "tiny world" else smollm2_like(tmp_path)
    processor = BlspKdProcessor.from_backbones(backbones[0], folder)
    rng = random.Random(0)
    words = [*" ".join(CORPUS).split(), "naïve", "🐈", "12", "...", "I'm", "x=1", "日本語", "(a)", "'s"]
    rows = [
        {
            "audio": None,
            "text": " ".join(rng.choices(words, k=rng.randint(1, 12))),
            "instruction": rng.choice([None, "Repeat the words.", "What is it?", "count 12"]),
            "response": " ".join(rng.choices(words, k=rng.randint(1, 8))),
        }
        for _ in range(300)
    ]
    features = processor.extract_features([(clip(0.1), 16_000)])["input_features"][0]
    rows = [{**row, "input_features": features} for row in rows]
    batch = BlspKdDataCollator(processor)(rows)
    for index, row in enumerate(rows):
        student, teacher, _, _ = parts_of(batch, index)
        assert (teacher, student) == alone(processor, row)


def test_ids_after_a_context_that_joins_are_those_of_a_line_or_of_the_text_alone(processor_of):
    processor = processor_of("byte-level BPE, line breaks", "none")
    tokenizer = AutoTokenizer.from_pretrained(processor.tokenizer.name_or_path)

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    assert ids(".\n") != ids(".") + ids("\n")  # it does join
    assert continue_ids(processor, ["The cat."], [ids("The cat.")], ["\n"]) == [ids("\n")]
    assert continue_ids(processor, ["a "], [ids("a ")], ["cat"]) == [ids("cat")]
