"""What was measured of a machine's speeds: stock and a policy at several depths, beside the rooflines."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from everlong.errors import ConfigurationError
from everlong.evaluation.rooflines import Floor
from everlong.evaluation.work import Work


@dataclass(frozen=True)
class SpeedPlan:
    """What is measured.

    Attributes
    ----------
    depths : tuple of int
        Tokens of context; smallest first.
    repeats : int
        At each depth; medians are taken.
    chunk, steps : int
        Tokens of the prefill chunk, and decode steps, per repeat.
    """

    depths: tuple[int, ...] = (1024, 8192, 32768)
    repeats: int = 5
    chunk: int = 512
    steps: int = 20

    def __post_init__(self) -> None:
        for name in ("repeats", "chunk", "steps"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.depths or min(self.depths) < 1 or len(set(self.depths)) < len(self.depths):
            raise ConfigurationError(
                f"depths are numbers of tokens, each at least 1 and given once, such as 1024,8192; not "
                f"{', '.join(map(str, self.depths)) or 'none'}"
            )
        object.__setattr__(self, "depths", tuple(sorted(self.depths)))


@dataclass(frozen=True)
class Side:
    """One way of reading at one depth: medians.

    Attributes
    ----------
    decode_ms : float
        Of one step, head included; of each repeat as of :func:`~everlong.evaluation.speed.step_seconds`.
    prefill_tokens_per_second : float
        Of a chunk, no head.
    prefill_flops : int
        Operations the chunk needs by definition, see
        :meth:`~everlong.evaluation.work.Work.prefill_flops`.
    prefill_share : float or None
        Of the matrix rate that was measured between the chunks; None: not all operations can be counted.
    bytes : int
        State held.
    allocated : int or None
        What filling it took of the device's memory, by PyTorch's account; None where it keeps none.
    """

    decode_ms: float
    prefill_tokens_per_second: float
    prefill_flops: int
    prefill_share: float | None
    bytes: int
    allocated: int | None


@dataclass(frozen=True)
class DepthSpeed:
    """Everything measured at one depth, in turn: medians of `repeats`.

    Attributes
    ----------
    depth : int
        Tokens of context.
    repeats : int
        Finished.
    stock, ours : Side
        Stock's cache holds `depth` tokens. A window is full, as late in a stream, whatever the depth.
    floor : Floor
        Kernels of one of our decode steps by themselves, in seconds.
    matrix_flops : float
        Floating-point operations per second of a large product of two matrices.
    bandwidth : float
        Bytes per second of reading a large buffer.
    decode_bytes : int
        Weights and window one of our decode steps reads.
    """

    depth: int
    repeats: int
    stock: Side
    ours: Side
    floor: Floor
    matrix_flops: float
    bandwidth: float
    decode_bytes: int

    @property
    def step_to_floor(self) -> float:
        """Our decode step, in times of its kernels."""
        return self.ours.decode_ms / (1000 * self.floor.step)

    @property
    def bus_ms(self) -> float:
        """Milliseconds to read what one of our decode steps reads, at the rate of the memory bus."""
        return 1000 * self.decode_bytes / self.bandwidth


@dataclass(frozen=True)
class SpeedReport:
    """Speeds of one model on one machine.

    Attributes
    ----------
    model : str
        Which, for people.
    policy : str or None
        Registered name; None: it has none.
    options : dict
        The policy's, resolved for the model.
    weights : {"float", "int8", "int4"}
        How our decode steps read them; stock reads the float ones.
    dtype, device : str
        Of the model.
    plan : SpeedPlan
        What was asked for.
    work : Work
        What the model has to do.
    weight_bytes : int
        Of weights one of our decode steps reads.
    rows : tuple of DepthSpeed
        One for each depth reached; the last may have fewer repeats.
    expected_seconds : float
        What all of it was thought to take.
    done : float
        How much of it is done, from 0 to 1.
    machine : dict
        See :func:`~everlong.evaluation.resources.describe_machine`.
    """

    model: str
    policy: str | None
    options: dict[str, Any]
    weights: str
    dtype: str
    device: str
    plan: SpeedPlan
    work: Work
    weight_bytes: int
    rows: tuple[DepthSpeed, ...]
    expected_seconds: float
    done: float
    machine: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Return plain values for JSON, with the ratios; those above 1 are in our favour."""
        plain = dataclasses.asdict(self)
        for key in ("expected_seconds", "done"):
            del plain[key]
        plain["work"]["linear"] = len(self.work.linear)  # not each one's name, and no shapes
        plain["work"]["layers"] = len(self.work.layers)
        for shown, row in zip(plain["rows"], self.rows, strict=True):
            stock, ours = row.stock, row.ours
            shown["ratios"] = {
                "decode": stock.decode_ms / ours.decode_ms,
                "prefill": ours.prefill_tokens_per_second / stock.prefill_tokens_per_second,
                "bytes": stock.bytes / ours.bytes,
            }
            shown["floor"] = {f"{key}_ms": 1000 * seconds for key, seconds in shown["floor"].items()}
            counted = {
                "step_to_floor": row.step_to_floor,
                "bus_ms": row.bus_ms,
                "products_tokens_per_second": row.matrix_flops / (2 * self.work.weights),
            }
            shown.update(counted if self.work.is_complete else dict.fromkeys(counted))
        return plain
