"""The teacher on disk: its buckets against literal ones, exactness with the whole vocabulary, and what is refused."""

import json
import shutil

import pytest
import torch

from examples import keep_teacher as script
from examples import train
from examples.experiments import measure_kept_teacher
from modeling_blsp_kd.distillation import linear_kl_of_rows
from modeling_blsp_kd.kept_teacher import keep_top
from processing.training_rows.kept_teacher import KeepOptions, TeacherOnDisk, keep_teacher
from tests.helpers.literal_losses import DIVERGENCES, literal_divergence, states
from tests.helpers.models import VOCAB_SIZE, make_model

pytestmark = pytest.mark.numerical

ALL = [{"divergence": "forward"}, *DIVERGENCES]
LOGITS = [{}, {"scale": 3.0, "softcap": 1.5}]


@pytest.mark.parametrize("options", LOGITS)
@pytest.mark.parametrize("divergence", ALL)
def test_with_the_whole_vocabulary_it_is_the_divergence_itself(divergence, options):
    student, teacher, weight = states()
    student.requires_grad_()
    kept = keep_top(teacher, weight, 2.0, len(weight), **options)
    expected = linear_kl_of_rows(student, teacher, weight, 2.0, **divergence, **options)
    actual = linear_kl_of_rows(student, kept, weight, 2.0, chunk_rows=3, **divergence, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    gradients = [torch.autograd.grad(each.sum(), student)[0] for each in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", LOGITS)
@pytest.mark.parametrize("divergence", ALL)
def test_a_few_tokens_and_the_tail_are_compared_as_a_distribution(divergence, options):
    student, teacher, weight = states()
    bias = torch.linspace(-1, 1, 11)
    kept = keep_top(teacher, weight, 1.7, 3, lm_head_bias=bias, **options)
    exact = student.double().requires_grad_()
    expected = 0
    for student_row, teacher_row in zip(exact, teacher.double()):
        buckets = []
        for row in (student_row, teacher_row):
            logits = (weight.double() @ row + bias.double()) * options.get("scale", 1.0)
            if "softcap" in options:
                logits = options["softcap"] * torch.tanh(logits / options["softcap"])
            buckets.append(torch.softmax(logits / 1.7, -1))
        top = buckets[1].topk(3).indices
        with_tail = [torch.cat([probs[top], 1 - probs[top].sum(0, keepdim=True)]) for probs in buckets]
        expected = expected + literal_divergence(*(probs.log() for probs in with_tail), 1.0, **divergence)
    student.requires_grad_()
    actual = linear_kl_of_rows(student, kept, weight, 1.7, lm_head_bias=bias, **divergence, **options).sum()
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(*pair)[0].double() for pair in ((actual, student), (expected, exact))]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_more_tokens_tell_more():
    """Joining tokens to a bucket can only lower a divergence."""
    student, teacher, weight = states(num_rows=50)
    of_k = [linear_kl_of_rows(student, keep_top(teacher, weight, 2.0, k), weight) for k in (1, 4, 10, 11)]
    assert all((fewer <= more + 1e-6).all() for fewer, more in zip(of_k, of_k[1:]))


def test_wrong_numbers_are_named():
    student, teacher, weight = states()
    with pytest.raises(ValueError, match="k must lie between 1 and 11, the size of the vocabulary, got 12"):
        keep_top(teacher, weight, 2.0, 12)
    with pytest.raises(ValueError, match=r"of one shape \(N, D\)"):
        linear_kl_of_rows(student, keep_top(teacher[:6], weight, 2.0, 3), weight)


@pytest.fixture
def kept_rows(rows):
    return [rows[0], {**rows[1], "audio": None}, rows[2]]


def keep(rows, model, collator, folder, **options):
    return keep_teacher(rows, model.language_model, collator, folder, KeepOptions(teacher="own", **options))


def test_a_step_reads_it_instead_of_the_text_prompts(kept_rows, collator, tmp_path):
    model = make_model("gemma2", distillation={"end_of_turn_kl": 0.5, "divergence": "jsd"})
    keep([*kept_rows, kept_rows[0]], model, collator, tmp_path, k=VOCAB_SIZE, rows_per_shard=2, batch_size=2)
    teacher = TeacherOnDisk(tmp_path)
    teacher.check(model, kept_rows)
    assert [shard["rows"] for shard in teacher.index["shards"]] == [2, 1]
    expected = model(**collator(kept_rows))
    batch = collator([{**row, "kept_teacher": teacher(row)} for row in kept_rows])
    ran = []
    model.language_model.base_model.register_forward_pre_hook(lambda *call: ran.append(call))
    actual = model(**batch)
    assert len(ran) == 1, "the LLM reads the speech prompts alone"
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-4, atol=1e-5)
    for name, part in expected.loss_parts.items():
        torch.testing.assert_close(actual.loss_parts[name], part, rtol=1e-4, atol=1e-5, msg=name)
    parameter = model.adapter.output_proj.bias
    gradients = [torch.autograd.grad(output.loss, parameter)[0] for output in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_what_was_stopped_goes_on_to_the_same_bytes(kept_rows, collator, tmp_path):
    model, options = make_model(), {"k": 5, "rows_per_shard": 1}
    index = keep(kept_rows, model, collator, tmp_path, **options)
    before = index.read_bytes()
    (tmp_path / "shard-00001.safetensors").unlink()
    with pytest.raises(ValueError, match="shard-00001.safetensors is missing or not as it was written"):
        TeacherOnDisk(tmp_path)
    keep(kept_rows, model, collator, tmp_path, **options)
    assert index.read_bytes() == before
    with pytest.raises(ValueError, match="was made with other rows or settings"):
        keep(kept_rows, model, collator, tmp_path, **{**options, "k": 6})
    (tmp_path / "index.json").unlink()
    with pytest.raises(ValueError, match="has no index.json"):
        TeacherOnDisk(tmp_path)


def test_what_does_not_fit_is_refused(kept_rows, collator, tmp_path):
    model = make_model()
    with pytest.raises(ValueError, match="1 of 1 rows have no response, the first with the text 'the red cat'"):
        keep([{**kept_rows[0], "response": ""}], model, collator, tmp_path)
    keep(kept_rows, model, collator, tmp_path, k=4)
    teacher = TeacherOnDisk(tmp_path)
    with pytest.raises(ValueError, match=r"does not have the row with the text .* the response 'nothing'"):
        teacher.check(model, [{**kept_rows[0], "response": "nothing"}])
    with pytest.raises(ValueError, match=r"was kept at temperature 2.0, but the losses are at 1.0"):
        teacher.check(make_model(distillation={"temperature": 1.0}), kept_rows)
    with pytest.raises(ValueError, match="is of own, which has 300 tokens, but the student has 310"):
        teacher.check(make_model(text={"vocab_size": 310}), kept_rows)
    with pytest.raises(ValueError, match="layer_alignment compares hidden states"):
        teacher.check(make_model(distillation={"layer_alignment": 1.0, "alignment_layers": [1]}), kept_rows)
    some = [{**kept_rows[0], "kept_teacher": teacher(kept_rows[0])}, kept_rows[1]]
    with pytest.raises(ValueError, match="1 of 2 rows of the batch bring what the teacher predicts"):
        collator(some)
    with pytest.raises(ValueError, match="Row 0 of the batch brings what the teacher predicts after other tokens"):
        collator([{**kept_rows[2], "kept_teacher": teacher(kept_rows[0])}])


def test_measured_losses_shrink_with_k(rows, collator):
    model = make_model()
    rows = [{**row, "duration": 1.0} for row in rows]
    results = measure_kept_teacher.measure(model, collator, rows, [1, 20, VOCAB_SIZE], 2)
    lost = [results["k"][k]["response_kl_lost"] for k in (1, 20, VOCAB_SIZE)]
    assert lost[0] > lost[1] > lost[2] and abs(lost[2]) < 1e-3 and results["hours"] == 3 / 3600
    assert measure_kept_teacher.table(results).count("\n") == 6


@pytest.mark.long
def test_the_scripts_train_as_with_the_teacher_itself(tmp_path, monkeypatch, capsys):
    clips = train.ROOT / "examples" / "tiny_world" / "clips"
    rows = [json.loads(line) for line in (clips / "metadata.jsonl").read_text().splitlines()[:8]]
    with open(tmp_path / "train.jsonl", "w") as manifest:
        for row in rows:
            shutil.copy(clips / row["file_name"], tmp_path)
            fields = {"audio": row["file_name"], "text": row["text"], "instruction": row["instruction"]}
            manifest.write(json.dumps({**fields, "response": row["answer"]}) + "\n")
    given = ["--train_manifest", str(tmp_path / "train.jsonl")]
    monkeypatch.setattr("sys.argv", ["keep_teacher.py", *given, "--output_dir", str(tmp_path / "kept"), "--k", "384"])
    script.main()
    assert "index.json: 8 rows" in capsys.readouterr().out
    losses = []
    for number, kept in enumerate(([], ["--kept_teacher", str(tmp_path / "kept")])):
        options = [*given, *kept, "--max_steps", "2", "--logging_steps", "1", "--eval_strategy", "no"]
        options += ["--output_dir", str(tmp_path / str(number)), "--use_cpu", "true", "--disable_tqdm", "true"]
        monkeypatch.setattr("sys.argv", ["train.py", *options, "--per_device_train_batch_size", "4"])
        train.main()
        state = json.loads((tmp_path / str(number) / "checkpoint-2" / "trainer_state.json").read_text())
        losses.append([log["loss"] for log in state["log_history"] if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and len(losses[0]) == 2
