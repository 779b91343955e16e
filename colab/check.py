"""How the labs check an exercise: the student's definition beside the project's own, on fresh random input.

An exercise is a function `run(definition)` that calls a definition, a function or a class, and returns what it gives:
a tensor, an array or a number, or a list of them. It is called for the project's definition, for the student's, and for
wrong definitions that students typically write. Where the student's output equals that of a wrong one, the check says
which mistake that is. No number is stored, therefore the version of PyTorch and the device do not matter.

    @exercise(reference=data.segments, mistakes=[("You took the first frame of each segment.", wrong), ...])
    def segments(definition):
        "The line that `progress()` prints for this exercise."
        return [definition(17, 5), definition(64, 8)]

Each lab has a module of its own in colab/checks, which a notebook imports as `check`:

    segments = check.segments(segments)   # the student's from here on if it is right, the project's own if it is not
    check.progress()                      # the state of all exercises

Input should have sizes that are all different, such as B=2, T=3, N=5, D=8: a mixed-up dimension then shows.
"""

import random
import sys
import traceback
import zlib

import torch

EXERCISES = {}  # (module, name) -> Exercise, in the order of their definition
NOT_WRITTEN, SOLVED = "not written yet", "right"


class MistakeError(Exception):
    """Raised by `run` for a mistake that it sees itself; the text is a sentence for the student."""


class Exercise:
    """One exercise. Calling it with the student's definition checks that and prints one sentence."""

    def __init__(self, run, reference, mistakes):
        self.run, self.reference, self.mistakes = run, reference, mistakes
        self.name, self.title, self.state = run.__name__, run.__doc__, NOT_WRITTEN
        EXERCISES[run.__module__, self.name] = self

    def __call__(self, definition):
        """Prints what is wrong -> `definition` if nothing is, else the project's own, with which the lab goes on."""
        if definition is not self.reference:  # else this cell is run again, after it put the project's own in place
            self.state = self.verdict(definition)
        stop = "" if self.state[-1] in ".!?" else "."
        print(f"{self.name}: {self.state}{stop}")
        if self.state == SOLVED:
            return definition
        print("Until it is right, the cells below use the project's own. After a change, run your cell and this one.")
        return self.reference

    def verdict(self, definition):
        """-> NOT_WRITTEN, SOLVED, or a sentence that names the mistake"""
        seed = random.randrange(2**31)
        expected = self.outputs(self.reference, seed)
        try:
            given = self.outputs(definition, seed)
        except NotImplementedError:
            return NOT_WRITTEN
        except MistakeError as mistake:
            return str(mistake)
        except Exception as error:
            cells = ("ipython-input", "ipykernel", "<cell")  # what notebooks call the file of a cell
            steps = [s for s in traceback.extract_tb(error.__traceback__) if any(c in s.filename for c in cells)]
            where = f" in line {steps[-1].lineno} of your cell" if steps else ""
            return f"It stops with {type(error).__name__}{where}: {error}"
        if same(given, expected):
            return SOLVED
        for sentence, wrong in self.mistakes:
            try:
                if same(given, self.outputs(wrong, seed)):
                    return sentence
            except Exception:  # a wrong definition may also fail on this input
                continue
        return difference(given, expected)

    def outputs(self, definition, seed):
        torch.manual_seed(seed)
        result = self.run(definition)
        return [as_tensor(x) for x in (result if isinstance(result, list) else [result])]


def exercise(reference, mistakes):
    """Makes an Exercise of `run`: the decorator at the top of this file."""
    return lambda run: Exercise(run, reference, mistakes)


def as_tensor(x):
    if x is None:
        raise MistakeError("It returns None: is the `return` missing?")
    try:
        return torch.as_tensor(x).detach().double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise MistakeError(f"It returns a {type(x).__name__}, which is neither a tensor nor a number.") from error


def same(given, expected):
    """Whether two lists of tensors agree in shapes and, up to rounding, in values."""
    return len(given) == len(expected) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(given, expected)
    )


def difference(given, expected):
    """A sentence for a mistake that has no name: shape or values of the first output that differs."""
    for a, b in zip(given, expected):
        if a.shape != b.shape:
            return f"The output has shape {tuple(a.shape)}, it should have {tuple(b.shape)}."
        if not same([a], [b]):
            i = (a - b).abs().nan_to_num(float("inf")).argmax()
            single, a, b = a.dim() == 0, a.flatten()[i].item(), b.flatten()[i].item()
            if single:
                return f"It gives {a:.6g} where it should give {b:.6g}."
            return f"The shape is right, the values are not: one of them is {a:.4g} and should be {b:.4g}."
    return "The number of outputs is wrong."


def fill(module, like=None):
    """Fills all parameters with random values, equal for equal names: then two modules can be compared -> module

    like: the project's module; other names or shapes than its own are a mistake that is named.
    """
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    wanted = shapes if like is None else {name: tuple(p.shape) for name, p in like.named_parameters()}
    if shapes != wanted:
        other = sorted(shapes.items() ^ wanted.items())[0][0]
        raise MistakeError(
            f"The parameter {other} is {shapes.get(other, 'missing')}, the project's is {wanted.get(other, 'missing')}."
        )
    seed = torch.initial_seed()
    for name, p in module.named_parameters():
        generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        p.data = torch.randn(p.shape, generator=generator) / max(p.shape[-1], 1) ** 0.5
    return module


def solution(definition):
    """Leaves the name what it was: a solution is for reading. Whoever deletes this decorator uses it."""
    return sys._getframe(1).f_globals.get(definition.__name__, definition)


def progress():
    """Prints the state of every exercise of the lab."""
    for number, task in enumerate(EXERCISES.values(), 1):
        state = task.state if task.state in (NOT_WRITTEN, SOLVED) else "not right yet"
        print(f"{number}. {task.name:20} {task.title:45} {state}")
    solved = sum(task.state == SOLVED for task in EXERCISES.values())
    print(f"{solved} of {len(EXERCISES)} solved")
