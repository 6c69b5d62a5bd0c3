"""Inputs of a policy besides latents: encoded prompts, and the steps of a schedule.

Shapes: `N` prompts, `S` tokens of the longest text, `...` the family's dimensions of a token or prompt.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts of a generation batch, padded to one length, so that rows do not depend on the micro-batch."""

    tensors: dict[str, Tensor]  # (N, ...), by the family's own names; the first are the texts, (N, S, ...)
    negative: "Conditioning | None" = None  # negative prompts, one per prompt; `None` without classifier-free guidance
    lengths: tuple[int, ...] | None = None  # tokens of each text; `None`: no padding, no mask

    @classmethod
    def of(cls, rows: Mapping[str, Sequence[Tensor]]) -> "Conditioning":
        """Stack N rows of each name; shorter texts are padded with zeros at the end."""
        lengths = tuple(len(text) for text in next(iter(rows.values())))
        tensors = {name: _stack(values) for name, values in rows.items()}
        return cls(tensors, lengths=lengths if len(set(lengths)) > 1 else None)

    def __getitem__(self, rows: Tensor) -> "Conditioning":
        """Select the prompts of `rows` (M,), preferably on the CPU like their lengths."""
        lengths = None if self.lengths is None else tuple(self.lengths[row] for row in rows.tolist())
        tensors = {name: value[rows.to(value.device)] for name, value in self.tensors.items()}
        return Conditioning(tensors, None if self.negative is None else self.negative[rows], lengths)

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def to(self, target: torch.dtype | torch.device) -> "Conditioning":
        """Move to a device, or cast to a dtype (except masks)."""
        is_dtype = isinstance(target, torch.dtype)
        return self._map(lambda value: value if is_dtype and not value.is_floating_point() else value.to(target))

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return next(iter(self.tensors.values())).device

    def texts(self) -> list[Tensor]:
        """Return the N texts without padding: (S_i, ...)."""
        padded = next(iter(self.tensors.values()))
        return [text[:length] for text, length in zip(padded, self._all_lengths(), strict=True)]

    def mask(self) -> Tensor | None:
        """Return the mask of tokens that are not padding, bool (N, S); `None` if no text is padded."""
        if self.lengths is None:
            return None
        padded = next(iter(self.tensors.values()))
        return (torch.arange(padded.shape[1]) < torch.tensor(self.lengths)[:, None]).to(padded.device)

    def join(self, other: "Conditioning") -> "Conditioning":
        """Return the prompts of both in one batch, without negative prompts."""
        joined = Conditioning.of({name: [*value, *other.tensors[name]] for name, value in self.tensors.items()})
        if self.lengths is None and other.lengths is None and joined.lengths is None:
            return joined
        return replace(joined, lengths=(*self._all_lengths(), *other._all_lengths()))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state; version 0.1.0 saved tensors as attributes."""
        negative, lengths = state.pop("negative"), state.pop("lengths", None)
        vars(self).update(tensors=state.get("tensors", state), negative=negative, lengths=lengths)

    def _all_lengths(self) -> tuple[int, ...]:
        padded = next(iter(self.tensors.values()))
        return (padded.shape[1],) * len(padded) if self.lengths is None else self.lengths

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Conditioning":
        negative = None if self.negative is None else self.negative._map(function)
        tensors = {name: function(value) for name, value in self.tensors.items()}
        return replace(self, tensors=tensors, negative=negative)


def _stack(rows: Sequence[Tensor]) -> Tensor:
    """Stack rows, padded with zeros to the longest."""
    longest = max(len(row) for row in rows)
    return torch.stack([_pad(row, longest) for row in rows])


def _pad(row: Tensor, length: int) -> Tensor:
    missing = length - len(row)
    return torch.cat([row, row.new_zeros(missing, *row.shape[1:])]) if missing else row


class Step(NamedTuple):
    """A step of a schedule; its tensors are 0-dimensional, on the CPU, in float32."""

    number: int  # from 0
    num_steps: int
    timestep: Tensor  # the scheduler's timestep, 1000 to 0
    sigmas: tuple[Tensor, Tensor]  # before the step and after it


@dataclass(frozen=True)
class Schedule:
    """The noise levels of a sampler with T steps, on the CPU in float32."""

    sigmas: Tensor  # (T + 1,), falling from at most 1 to 0
    timesteps: Tensor  # (T,), the scheduler's, 0 to 1000

    def __getitem__(self, number: int) -> Step:
        """Return step `number`, from 0 to T - 1."""
        sigmas = self.sigmas[number], self.sigmas[number + 1]
        return Step(number, len(self.timesteps), self.timesteps[number], sigmas)
