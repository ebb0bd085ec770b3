"""`BlspKdTrainer`: transformers' Trainer that counts and logs every part of the distillation loss.

The loss itself comes from `BlspKdForCausalLM.forward`. Leaves out: data (see `processing/data_collator.py`) and scoring
of generated answers (see `examples/`).
"""

import torch
from transformers import Trainer


class BlspKdTrainer(Trainer):
    """Trains a [`BlspKdForCausalLM`] on batches of [`BlspKdDataCollator`].

    Training and evaluation log the same parts under the same names (with the prefix `eval_` in evaluation):
    `response_kl`, `input_kl`, `quantity` and whatever else the loss weighs, each the mean over its tokens or clips
    since the last log, over all processes; `token_count_accuracy` and `token_count_error` compare predicted with true
    token counts. Evaluation always reports the KLs: they measure how well speech and text are aligned.

    Takes the arguments of `Trainer`. `TrainingArguments` needs `remove_unused_columns=False`; `processing_class` should
    be the processor, so that every checkpoint holds it.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.remove_unused_columns:
            raise ValueError(
                "BlspKdTrainer needs TrainingArguments(remove_unused_columns=False): the collator reads the rows' own "
                "columns (audio, text, ...), which are no arguments of the model."
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"torch.nn.DataParallel over {self.args.n_gpu} GPUs is not supported. Start one process per GPU: "
                "`accelerate launch --multi_gpu ...` (or set CUDA_VISIBLE_DEVICES to one GPU)."
            )
        self.accelerator.unwrap_model(self.model).check_output_head()
        # forward divides each part by its own count over the whole optimiser step.
        self.model_accepts_loss_kwargs = True
        self._loss_parts = {"train": {}, "eval": {}}

    def _get_num_items_in_batch(self, batch_samples, device):
        """Response tokens, content tokens and clips of one optimiser step: a tensor of shape (3,)."""
        if not batch_samples:
            return None
        counts = torch.zeros(3, dtype=torch.long, device=device)
        for batch in batch_samples:
            counts[0] += (batch["labels"][:, 1:] != -100).sum().to(device)
            counts[1] += batch["teacher_is_content"].sum().to(device)
            counts[2] += len(batch["input_features"])
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        return counts

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        collected = self._loss_parts["train" if model.training else "eval"]
        for name, sum_and_count in outputs["loss_parts"].items():
            collected[name] = collected.get(name, 0) + sum_and_count
        return (loss, outputs) if return_outputs else loss

    def _collected_means(self, stage: str) -> dict[str, float]:
        """Means of all parts since the last call, over all processes."""
        collected, self._loss_parts[stage] = self._loss_parts[stage], {}
        if not collected:
            return {}
        totals = self.accelerator.reduce(torch.stack(list(collected.values())), reduction="sum").tolist()
        return {name: total / max(count, 1) for name, (total, count) in zip(collected, totals)}

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs = {**logs, **self._collected_means("train")}
        super().log(logs, start_time)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        # A distillation step returns no logits; generated answers are scored elsewhere.
        return super().prediction_step(model, inputs, prediction_loss_only=True, ignore_keys=ignore_keys)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        self._loss_parts["eval"] = {}
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._collected_means("eval")
        output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in means.items()})
        weights = self.accelerator.unwrap_model(self.model).config.distillation
        # The Trainer averages batch means; the parts are exact means over the data set, so the loss should be too.
        output.metrics[f"{metric_key_prefix}_loss"] = sum(weights.get(name, 0) * mean for name, mean in means.items())
        return output
