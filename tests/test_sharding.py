"""The distillation loss on weights that FSDP2 shards over two processes (gloo).

Each process holds half of every weight and half of the batch. Leaves out: the Trainer (`test_trainer.py`).
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model
from torch.distributed import destroy_process_group, get_rank, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

OPTIONS = [
    {"plora": {"lora_dropout": 0.0}, "distillation": {"response_ce": 0.5, "transcript_ce": 0.5}},
    {"plora": {"lora_dropout": 0.0}, "text": {"tie_word_embeddings": True}},
    {"freeze_speech_encoder": True},
]


def loss_and_gradients(model, batch, factor=1):
    loss = model(**batch).loss
    (factor * loss).backward()
    return loss.detach(), {
        name: parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def training_model(options, checkpointing):
    model = make_model(**options).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


@pytest.mark.parametrize(("checkpointing", "hears_nothing"), [(False, False), (True, False), (True, True)])
def test_two_processes_with_sharded_weights_equal_one(checkpointing, hears_nothing, tmp_path, collator, rows):
    """A head that is read outside the forward, or kept from an earlier one, is a shard or a freed weight there.

    A process whose batch has no audio gathers the encoder's weights all the same, or the other one waits for ever.
    """
    first = {**rows[0], "audio": None} if hears_nothing else rows[0]
    batches = [collator([first]), collator(rows[1:])]
    counts = torch.stack([batch_counts(batch) for batch in batches]).sum(0)
    torch.save({"batches": batches, "counts": counts, "checkpointing": checkpointing}, tmp_path / "work.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    run = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    for options, actual in zip(OPTIONS, torch.load(tmp_path / "result.pt"), strict=True):
        model = training_model(options, checkpointing)
        expected = [loss_and_gradients(model, {**batch, "num_items_in_batch": counts}) for batch in batches]
        torch.testing.assert_close(actual["loss"], expected[0][0] + expected[1][0])
        # The gradients of both batches have been added up in place.
        assert actual["gradients"].keys() == expected[1][1].keys()
        for name, gradient in expected[1][1].items():
            torch.testing.assert_close(actual["gradients"][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def batch_counts(batch):
    """Response tokens, content tokens, clips, as the Trainer counts them."""
    responses = (batch["labels"][:, 1:] != -100).sum()
    return torch.stack([responses, batch["teacher_is_content"].sum(), torch.tensor(len(batch["input_features"]))])


def main(folder):
    """One of two processes."""
    init_process_group("gloo")
    work = torch.load(folder / "work.pt")
    mesh = init_device_mesh("cpu", (2,))
    results = []
    for options in OPTIONS:
        model = training_model(options, work["checkpointing"])
        for layer in model.language_model.base_model.layers:
            fully_shard(layer, mesh=mesh)
        if not model.config.tie_word_embeddings:
            fully_shard(model.get_output_embeddings(), mesh=mesh)  # as accelerate does
        fully_shard(model, mesh=mesh)
        batch = {**work["batches"][get_rank()], "num_items_in_batch": work["counts"]}
        # FSDP2 takes the mean over processes; the sum is what one process has.
        loss, gradients = loss_and_gradients(model, batch, factor=2)
        torch.distributed.all_reduce(loss)
        results.append({"loss": loss, "gradients": gradients})
    if get_rank() == 0:
        torch.save(results, folder / "result.pt")
    destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
