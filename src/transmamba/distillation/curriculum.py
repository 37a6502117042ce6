"""Where the TransPoints are at each step of a training run: they come down from the end of the sequence, where the
student is its teacher, to the target.

Every value is a function of the step and the seed alone, so that a run which goes on from a checkpoint sees the same
schedules as one that was never interrupted.
"""

import random
from dataclasses import dataclass

from transmamba.errors import RecipeError
from transmamba.schedule import TransPointSchedule


@dataclass(frozen=True, kw_only=True, slots=True)
class TransPointCurriculum:
    """How TransPoints move over the steps of a stage.

    descent: the share of the steps during which they come down from seq_len to the target, by an equal factor a step;
        0 = they are at the target from the first step.
    freedom: the share of the steps in which every layer stands at a place of its own, drawn evenly, as
        TransPointSchedule.partway measures it, between where the descent is and the end of the sequence. It keeps the
        student usable at all schedules in between.
    """

    descent: float = 0.0
    freedom: float = 0.0

    def __post_init__(self) -> None:
        for name in ("descent", "freedom"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise RecipeError(f"{name}={value} must be between 0 and 1; it is a share of the steps.")

    @property
    def moves(self) -> bool:
        """Whether any step may run at another schedule than the target."""
        return self.descent > 0 or self.freedom > 0

    def schedule_at(
        self, step: int, num_steps: int, target: TransPointSchedule, seq_len: int, *, seed: int = 0
    ) -> TransPointSchedule:
        """The schedule of step 0, 1, ..., num_steps - 1."""
        descending = self.descent * num_steps
        share = 1.0 if step >= descending else (step + 1) / (descending + 1)
        draw = random.Random(f"{seed}:{step}")
        if draw.random() < self.freedom:
            return target.partway(seq_len, [share * draw.random() for _ in target])
        return target.partway(seq_len, share)
