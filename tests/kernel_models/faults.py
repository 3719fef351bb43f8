"""Wrong results on purpose: for one op, one tactic, some numbers of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Kind = Literal["nan", "wrong", "raise"]


@dataclass
class Fault:
    """`kind` of damage; `tactic` None means every tactic, the fallback -1 included."""

    op: str
    kind: Kind
    tactic: int | list[int] | None
    when: Callable[[int], bool]

    def meets(self, op: str, tactic: int | list[int], num_tokens: int) -> bool:
        same = self.tactic is None or self.tactic == tactic
        return self.op == op and same and self.when(num_tokens)


@dataclass
class Faults:
    """The faults of a model library. `hits` counts how often one struck."""

    active: list[Fault] = field(default_factory=list)
    hits: int = 0

    def add(
        self,
        op: str,
        kind: Kind,
        tactic: int | list[int] | None = None,
        when: Callable[[int], bool] = lambda num_tokens: True,
    ) -> None:
        """`op` as the autotuner names it: "fp4_gemm", "flashinfer::trtllm_fp4_block_scale_moe", ...

        "nan" makes one element of the result NaN, "wrong" moves its largest element by 1 plus its own size, "raise" is
        a RuntimeError.
        """
        self.active.append(Fault(op, kind, tactic, when))

    def clear(self) -> None:
        self.active.clear()

    def apply(self, op: str, tactic: int | list[int], num_tokens: int, out: Tensor) -> None:
        """Damage `out` in place where a fault meets the call."""
        for fault in self.active:
            if not fault.meets(op, tactic, num_tokens):
                continue
            self.hits += 1
            if fault.kind == "raise":
                raise RuntimeError(f"{op}: tactic {tactic} failed (a fault of the model library)")
            if out.numel():
                damage(out, fault.kind)


def damage(out: Tensor, kind: Kind) -> None:
    index = int(out.float().abs().argmax())
    row, column = divmod(index, out.shape[-1])
    element = out.reshape(-1, out.shape[-1])[row]  # a view: outputs are contiguous
    value = float(element[column])
    element[column] = float("nan") if kind == "nan" else value + 1.0 + abs(value)
