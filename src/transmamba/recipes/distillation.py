"""A whole run that distils a teacher into a TransMamba, and the three recipes that come with the library.

A run has up to three stages, in this order; a stage whose share of the tokens is 0 is left out:
    matrices    each layer's mixing matrix comes near the teacher's attention matrix, on the teacher's input
    mixers      each layer's output comes near the teacher's, on the teacher's input
    logits      the whole student comes near the teacher's distribution of the next token, and near the text
"""

import math
from dataclasses import dataclass, field

from transmamba.data import TextSource
from transmamba.distillation import TransPointCurriculum
from transmamba.errors import RecipeError
from transmamba.recipes.training_run import TrainingRun, check_learning_rate
from transmamba.schedule import TransPointSchedule

__all__ = ["AlignmentStage", "DistillationRun", "LogitStage", "descend", "mohawk", "plain_kl"]

TRAINABLE = ("ssm", "mixers", "all")


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignmentStage:
    """Layers learn side by side from the teacher's own inputs and outputs, on the tokens from their TransPoint on.

    share: of the run's tokens. trainable: "ssm", the parameters that only the state space reads, so that attention
        stays as it was; "mixers", whole mixers.
    """

    share: float = 0.0
    learning_rate: float = 3e-3
    trainable: str = "ssm"
    trans_point_schedule: TransPointCurriculum = field(default_factory=TransPointCurriculum)

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise RecipeError(f"share={self.share} must be at least 0 and below 1; the last stage needs some tokens.")
        _check_stage(self.learning_rate, self.trainable, TRAINABLE[:2])


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitStage:
    """The student as a whole learns kl_weight temperature^2 KL(teacher || student) + ce_weight cross-entropy.

    trainable: "ssm", "mixers" or "all". lora_rank: of the trainable layers that come from the teacher, train updates of
        this rank only, which are merged at the end; the state space's own parameters are trained whole, and the rest
        (norms, embedding) is kept. None = train everything whole.
    """

    learning_rate: float = 5e-4
    temperature: float = 1.0
    kl_weight: float = 1.0
    ce_weight: float = 0.0
    trainable: str = "all"
    lora_rank: int | None = None
    trans_point_schedule: TransPointCurriculum = field(default_factory=TransPointCurriculum)

    def __post_init__(self) -> None:
        _check_stage(self.learning_rate, self.trainable, TRAINABLE)
        if not 0 < self.temperature < math.inf:
            raise RecipeError(
                f"temperature={self.temperature} must be above 0; 1 compares the distributions as they are."
            )
        if not (self.kl_weight >= 0 and self.ce_weight >= 0 and 0 < self.kl_weight + self.ce_weight < math.inf):
            raise RecipeError(
                f"kl_weight={self.kl_weight} and ce_weight={self.ce_weight} must be at least 0, and one of them above."
            )
        if self.lora_rank is not None and self.lora_rank < 1:
            raise RecipeError(f"lora_rank={self.lora_rank} must be at least 1, or none to train whole matrices.")


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillationRun(TrainingRun):
    """Everything that decides what a distilled student is, beside what TrainingRun says.

    teacher: the folder or Hub name of a causal language model, or a folder that `transmamba record` wrote.
    student: the folder of a TransMamba, such as `transmamba convert` writes.
    schedule: the TransPoints to arrive at, a name, a written list or a list; None = the student's own. Those at or
        beyond seq_len become None.
    seq_len: of the windows; None = the student's max_position_embeddings.
    document_boundaries: documents start anew inside a window; false makes of each window one document, so that every
        position is trained.
    max_tokens: read by all stages together, at most.
    warmup_share: of each stage's steps, in which the learning rate rises to its peak.
    """

    text: TextSource = field(default_factory=lambda: TextSource(source="builtin:python-docs"))
    teacher: str = ""
    student: str = ""
    schedule: str | tuple[int | None, ...] | None = None
    seq_len: int | None = None
    document_boundaries: bool = True
    max_tokens: int
    matrices: AlignmentStage = field(default_factory=AlignmentStage)
    mixers: AlignmentStage = field(default_factory=AlignmentStage)
    logits: LogitStage = field(default_factory=LogitStage)
    warmup_share: float = 0.05

    def __post_init__(self) -> None:
        if self.schedule is not None and not isinstance(self.schedule, str):
            object.__setattr__(self, "schedule", tuple(TransPointSchedule(self.schedule)))
        self.check_training()
        if self.max_tokens < 1:
            raise RecipeError(f"max_tokens={self.max_tokens} must be at least 1.")
        if self.seq_len is not None and self.seq_len < 2:
            raise RecipeError(f"seq_len={self.seq_len} must be at least 2: a token is predicted from one before it.")
        if self.matrices.share + self.mixers.share >= 1:
            raise RecipeError(
                f"matrices.share={self.matrices.share} and mixers.share={self.mixers.share} leave nothing for the last "
                "stage; their sum must be below 1."
            )
        if not 0 <= self.warmup_share < 1:
            raise RecipeError(f"warmup_share={self.warmup_share} must be at least 0 and below 1.")

    def stage_steps(self, seq_len: int) -> dict[str, int]:
        """Optimizer steps of each stage that has any, in order."""
        total = max(1, self.max_tokens // (self.batch_size * seq_len))
        matrices, mixers = (round(stage.share * total) for stage in (self.matrices, self.mixers))
        steps = {"matrices": matrices, "mixers": mixers, "logits": max(1, total - matrices - mixers)}
        return {name: number for name, number in steps.items() if number}


def descend() -> DistillationRun:
    """Ours: layers are aligned first, then TransPoints come down while the student learns from teacher and text:
    `transmamba distill --teacher T --student S --data text/ --tokens 20000000`.
    """
    return DistillationRun(
        name="descend",
        batch_size=16,
        max_tokens=20_000_000,
        mixers=AlignmentStage(share=0.02, trans_point_schedule=TransPointCurriculum(freedom=0.5)),
        logits=LogitStage(ce_weight=1.0, trans_point_schedule=TransPointCurriculum(descent=0.1, freedom=0.3)),
        log_every=10,
        save_every=200,
    )


def mohawk() -> DistillationRun:
    """A baseline: MOHAWK's three stages (arXiv 2408.10189) and shares of the tokens, 80 M, 160 M and 2.76 B of 3 B.

    Attention weights are those of the student, which `transmamba convert` copies, and only rows from a TransPoint on
    are aligned.
    """
    return DistillationRun(
        name="mohawk",
        batch_size=16,
        max_tokens=20_000_000,
        matrices=AlignmentStage(share=0.027, learning_rate=5e-4, trainable="mixers"),
        mixers=AlignmentStage(share=0.053, learning_rate=5e-4, trainable="mixers"),
        logits=LogitStage(),
        log_every=10,
        save_every=200,
    )


def plain_kl() -> DistillationRun:
    """A baseline: the teacher's logits and nothing else, at the target schedule from the first step."""
    return DistillationRun(
        name="plain_kl", batch_size=16, max_tokens=20_000_000, logits=LogitStage(), log_every=10, save_every=200
    )


def _check_stage(learning_rate: float, trainable: str, known: tuple[str, ...]) -> None:
    check_learning_rate("learning_rate", learning_rate)
    if trainable not in known:
        raise RecipeError(f"trainable={trainable!r} is unknown here; choose one of {', '.join(known)}.")
