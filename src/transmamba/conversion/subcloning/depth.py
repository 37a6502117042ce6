"""Which block of the teacher each block of the student comes from."""

from collections.abc import Sequence

from transmamba.errors import InputError


def depth_map(
    teacher_layers: int,
    student_layers: int,
    given: Sequence[int | None] | None = None,
    early_layers: int | None = None,
) -> tuple[int | None, ...]:
    """For every block of the student a block of the teacher, from 0, or None = it begins as in a new model.

    given: the map itself. Without one, blocks are matched one to one; a student that is deeper by a whole factor takes
    each block so many times in a row; a shallower one takes the first blocks. early_layers: only so many blocks of the
    student, from the first on, begin from the teacher.

    Raises:
        InputError: the map does not fit, or there is no rule for these depths.
    """
    if given is not None:
        chosen = tuple(given)
        if len(chosen) != student_layers:
            raise InputError(
                f"depth_map has {len(chosen)} entries and the student {student_layers} blocks; give one for each."
            )
        for place, block in enumerate(chosen):
            if block is not None and not 0 <= block < teacher_layers:
                raise InputError(
                    f"depth_map[{place}]={block} is no block of the teacher, which has {teacher_layers}, from 0 to "
                    f"{teacher_layers - 1}."
                )
    elif student_layers <= teacher_layers:
        chosen = tuple(range(student_layers))
    elif student_layers % teacher_layers == 0:
        times = student_layers // teacher_layers
        chosen = tuple(block for block in range(teacher_layers) for _ in range(times))
    else:
        raise InputError(
            f"the student has {student_layers} blocks, which is no multiple of the teacher's {teacher_layers}; give a "
            "depth_map with a block of the teacher, or None, for each."
        )
    if early_layers is None:
        return chosen
    if not 0 <= early_layers <= student_layers:
        raise InputError(f"early_layers={early_layers} must be between 0 and the student's {student_layers} blocks.")
    return tuple(block if place < early_layers else None for place, block in enumerate(chosen))
