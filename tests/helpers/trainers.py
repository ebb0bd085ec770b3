"""A trainer with a small model and rows enough for several steps."""

from datasets import Dataset
from transformers import TrainingArguments

from modeling_blsp_kd import BlspKdTrainer

from .models import make_model
from .prompts import clip

NUM_ROWS = 16


def many_rows():
    words = "the red cat ran to the river and repeat the words".split()
    return [
        {
            "audio": {"array": clip(0.4 + 0.1 * (index % 7), seed=index).tolist(), "sampling_rate": 16_000},
            "text": " ".join(words[: 1 + index % 5]),
            "instruction": "repeat the words",
            "response": " ".join(words[index % 3 : 2 + index % 8]) or "cat",
        }
        for index in range(NUM_ROWS)
    ]


def make_trainer(folder, processor, collator, model=None, max_batch_length=None, on_policy=None, **overrides):
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": NUM_ROWS,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "seed": 0,
    }
    model = make_model(plora={"lora_dropout": 0.0}, distillation={"response_ce": 0.5}) if model is None else model
    dataset = Dataset.from_list(many_rows())
    return BlspKdTrainer(
        model=model,
        args=TrainingArguments(**{**options, **overrides}),
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=collator,
        processing_class=processor,
        max_batch_length=max_batch_length,
        on_policy=on_policy,
    )
