"""Sentences that the LLM writes for synthesizers: each follows from its number, also after a stop."""

import pytest

from examples.experiments.real_backbones import write_sentences
from examples.experiments.real_backbones.sentences import read_sentences
from examples.experiments.real_backbones.write_sentences import END, count_and_repair, read_topics, request_of


def test_a_stopped_run_goes_on_and_gives_the_same(backbones, tmp_path):
    topics = tmp_path / "topics.txt"
    topics.write_text("The red river. A cat, the RIVER and a word with 1234.")
    assert read_topics([topics]) == ["river", "with", "word"]

    def write(output, num):
        # One row a batch: the tokens do not depend on what else is in it.
        given = ["--text_model", backbones[1], "--topics", topics, "--output", output, "--num", num]
        write_sentences.main([str(each) for each in [*given, "--batch_size", 1, "--max_new_tokens", 8]])
        return output.read_text()

    whole = write(tmp_path / "whole.txt", 5)
    assert whole.count(END) == 5
    stopped = tmp_path / "stopped.txt"
    write(stopped, 2)
    stopped.write_text(stopped.read_text() + "half a sen")
    assert write(stopped, 5) == whole
    assert write(stopped, 5) == whole


def test_requests_differ_and_follow_from_number_and_seed():
    topics = ["river", "cats", "word"]
    requests = [request_of(number, topics, seed=1) for number in range(40)]
    assert requests == [request_of(number, topics, seed=1) for number in range(40)]
    assert requests != [request_of(number, topics, seed=2) for number in range(40)]
    assert len(set(requests)) > 8


def test_a_file_without_a_whole_sentence_begins_anew(tmp_path):
    output = tmp_path / "written.txt"
    output.write_text("half a sen")
    assert count_and_repair(output) == 0 and output.read_text() == ""


def test_an_answer_that_was_cut_is_no_sentence(tmp_path):
    output = tmp_path / "written.txt"
    output.write_text(f'"The river runs to the sea."{END}-{END}Why does it rain?{END}')
    sentences, _ = read_sentences(output, 3, 20)
    assert [sentence.text for sentence in sentences] == ["the river runs to the sea", "why does it rain"]


def test_topics_need_a_word(tmp_path):
    (tmp_path / "topics.txt").write_text("a an it")
    with pytest.raises(ValueError, match="no word of four letters"):
        read_topics([tmp_path / "topics.txt"])
