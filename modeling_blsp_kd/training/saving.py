"""A Trainer whose checkpoints are atomic, and which pushes the code and the model card, too."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from huggingface_hub import ModelCard
from transformers import Trainer
from transformers.trainer_utils import HubStrategy, TrainOutput

from ..backbone_names import CHECKSUM, as_trained
from ..configuration_blsp_kd import BlspKdConfig
from .atomic_checkpoints import ASIDE, choose_checkpoint, move_into_place, remove_old
from .card import card_of_training


def check_backbones_of(checkpoint: str, config: BlspKdConfig):
    """Check that a thin checkpoint to resume from was trained on the backbones of the model that goes on.

    Raises:
        ValueError: it was not.
    """
    if config.backbones is None or not Path(checkpoint, "config.json").is_file():
        return
    before = BlspKdConfig.from_pretrained(checkpoint).backbones or {}
    for part, entry in before.items():
        then, now = entry["revision"], config.backbones[part]["revision"]
        # A commit and a checksum cannot be compared.
        if then != now and then.startswith(CHECKSUM) == now.startswith(CHECKSUM):
            raise ValueError(
                f"{checkpoint} was trained on another {part}: {entry['name_or_path']} ({then}), but the model that is "
                f"to go on has {config.backbones[part]['name_or_path']} ({now}). Give it the one of the checkpoint."
            )


class AtomicSaving(Trainer):
    """A Trainer that writes whole checkpoints or none.

    `make_card`, if it is not None, returns the [`ModelCard`] that `push_to_hub` uploads.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.make_card: Callable[[], ModelCard] | None = None
        self._is_writing_aside = False

    def train(self, *args, **kwargs) -> TrainOutput:
        config = self.accelerator.unwrap_model(self.model).config
        config.backbones = as_trained(config.backbones)
        return super().train(*args, **kwargs)

    def save_own_state(self, checkpoint: Path):
        """Write what a subclass adds to a checkpoint; called in all processes."""

    def choose_checkpoint(self, resume_from: str | bool) -> str:
        """Return the checkpoint to resume from. The main process verifies it; all processes fail or go on together."""
        chosen: list[Any] = [None, None]
        if self.is_world_process_zero():
            try:
                chosen[0] = choose_checkpoint(resume_from, self.args.output_dir)
                check_backbones_of(chosen[0], self.accelerator.unwrap_model(self.model).config)
            except ValueError as error:
                chosen[1] = str(error)
        broadcast_object_list(chosen)
        if chosen[1]:
            raise ValueError(chosen[1])
        return chosen[0]

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, ASIDE) if self._is_writing_aside else folder

    def _push_from_checkpoint(self, checkpoint_folder):
        if self._is_writing_aside:
            return
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            # The Trainer pushes weights and configs, but nobody can load them without the code.
            for file in Path(checkpoint_folder).glob("*.py"):
                shutil.copy(file, self.args.output_dir)
            self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, *args, **kwargs):
        """Write the card of the model to `output_dir`; the arguments of `Trainer.create_model_card` are not used."""
        if self.is_world_process_zero():
            card = self.make_card() if self.make_card else card_of_training(self)
            card.save(Path(self.args.output_dir, "README.md"))

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial))
        aside, final = folder / ASIDE, folder / f"checkpoint-{self.state.global_step}"
        written = aside / final.name
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed while writing
        self.accelerator.wait_for_everyone()
        self._is_writing_aside = True
        try:
            super()._save_checkpoint(model, trial)
            self.save_own_state(written)
            if self.state.best_model_checkpoint == str(written):
                self.state.best_model_checkpoint = str(final)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(written / "trainer_state.json"))
                move_into_place(written, final)
                # Only now, when the new one is complete.
                keep = {str(final), str(self.state.best_model_checkpoint)}
                remove_old(folder, aside, self.args.save_total_limit, keep)
        except Exception as error:
            shutil.rmtree(aside, ignore_errors=True)
            free = shutil.disk_usage(folder).free / 2**20
            raise OSError(
                f"{final} could not be written: {error} ({free:.0f} MiB are free there). Earlier checkpoints are "
                "intact. Make room, then go on with resume_from_checkpoint=True."
            ) from error
        finally:
            self._is_writing_aside = False
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
