"""Groups of parameters with learning rates and weight decay of their own.

The pretrained speech encoder usually needs a smaller learning rate than the untrained adapter.
"""

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import get_parameter_names
from transformers.training_args import OptimizerNames

NOT_DECAYING = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]  # as in the Trainer
OPTIMIZERS_WITH_OWN_GROUPS = tuple(
    name for name in OptimizerNames if name.value.startswith(("galore", "apollo", "lomo", "adalomo"))
)


def optimizer_with_groups(
    model: torch.nn.Module, args: TrainingArguments, encoder_learning_rate: float
) -> tuple[type, dict]:
    """Return the Trainer's optimiser class and its options, with a learning rate for `model.audio_tower` of its own.

    The optimiser is not yet made, as FSDP needs it. As in the Trainer, neither biases nor norms decay.

    Returns:
        `tuple`: for the argument `optimizer_cls_and_kwargs` of a Trainer.
    """
    optimizer_class, optimizer_options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    of_encoder = {id(parameter) for parameter in model.audio_tower.parameters()}
    decaying = get_parameter_names(model, [torch.nn.LayerNorm], NOT_DECAYING) if args.weight_decay else []
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in of_encoder, name in decaying), []).append(parameter)
    return optimizer_class, {
        **optimizer_options,
        "params": [
            {
                "params": parameters,
                "weight_decay": args.weight_decay if decays else 0.0,
                **({"lr": encoder_learning_rate} if is_encoder else {}),
            }
            for (is_encoder, decays), parameters in sorted(groups.items(), key=lambda group: group[0])
        ],
    }


def check_groups(trainer: Trainer, encoder_learning_rate: float | None):
    """Refuse a learning rate for the encoder beside an optimiser that has groups of its own.

    Raises:
        ValueError: the rate is given, and the trainer has such an optimiser.
    """
    if encoder_learning_rate is None:
        return
    if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
        raise ValueError(
            "encoder_learning_rate groups the parameters of the optimiser of TrainingArguments, and optimizers or "
            "optimizer_cls_and_kwargs bring their own groups. Pass the one or the other."
        )
    if trainer.args.optim in OPTIMIZERS_WITH_OWN_GROUPS:
        raise ValueError(
            f"optim={trainer.args.optim.value!r} takes its own groups of parameters, so encoder_learning_rate cannot "
            "group them by learning rate. Use another optimiser, or leave encoder_learning_rate out."
        )
