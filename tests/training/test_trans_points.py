"""TransPoints that move while a model trains."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tests.training.test_trainer import make_trainer
from transmamba.schedule import TransPointSchedule
from transmamba.training import MovingTransPoints, causal_lm_loss


def test_every_step_runs_with_its_own_schedule(tmp_path: Path) -> None:
    seen: list[list[int | None]] = []

    def loss_fn(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        seen.append(list(model.config.trans_points))
        return causal_lm_loss(model, batch)

    trainer = make_trainer(tmp_path, max_steps=4, loss_fn=loss_fn)
    trainer.add_callback(MovingTransPoints(trainer.model, lambda step: TransPointSchedule([step, None, 2 * step])))
    trainer.train()
    assert seen == [[step, None, 2 * step] for step in range(4)]
