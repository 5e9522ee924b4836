"""What decides the weights that a training ends with."""

from dataclasses import dataclass
from typing import Any

from lostreg import defaults
from lostreg.checks import real_number, whole_number, whole_seed
from lostreg.errors import OptionError
from lostreg.training.views import AGGREGATES


@dataclass(frozen=True)
class TrainingOptions:
    """What decides the weights that a training ends with, beside the backbone and the images.

    Attributes:
        registers: how many tokens are added; 0 is the control, in which nothing but the loss is new.
        steps: updates, at most: training ends early where the held-out loss does not fall any more.
        max_side: side of the square windows that teacher and student see, in pixels, at most.
        views: of each picture that the teacher looks at, the first of them straight.
        aggregate: how the teacher brings views together, a name of `AGGREGATES`.
        learning_rate: of AdamW at its highest; it falls to 5e-6.
        unlock: which parts of the student learn, see `PARTS`.
        batch_size: pictures a step, over all processes.
        sample: how many images are learned from at most, drawn at random.
        seed: of that sample, the views, the order of pictures and the new registers.

    Raises:
        OptionError: if one is outside its range.

    Example:
        >>> lostreg.TrainingOptions(registers=16).unlock
        ('registers', 'positions')
    """

    registers: int = defaults.TRAINING_REGISTERS
    steps: int = defaults.TRAINING_STEPS
    max_side: int = defaults.TRAINING_SIDE
    views: int = defaults.TRAINING_VIEWS
    aggregate: str = defaults.AGGREGATES[0]
    learning_rate: float = defaults.LEARNING_RATE
    unlock: tuple[str, ...] = defaults.UNLOCKED
    batch_size: int = defaults.BATCH_SIZE
    sample: int = defaults.TRAINING_IMAGES
    seed: int = 0

    def __post_init__(self) -> None:
        plain: dict[str, Any] = {"registers": whole_number(self.registers, "registers", least=0, most=4096)}
        plain |= {
            name: whole_number(getattr(self, name), name)
            for name in ("steps", "max_side", "views", "batch_size", "sample")
        }
        plain["learning_rate"] = real_number(
            self.learning_rate, "learning_rate", least=1e-12, most=1, expected="a number above 0 and at most 1"
        )
        plain["unlock"], plain["seed"] = tuple(self.unlock), whole_seed(self.seed)
        if self.aggregate not in AGGREGATES:
            raise OptionError(f"aggregate must be one of {', '.join(AGGREGATES)}, not '{self.aggregate}'")
        vars(self).update(plain)
