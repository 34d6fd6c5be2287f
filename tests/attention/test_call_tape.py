"""What a tape of calls keeps, leaves out, and refuses."""

import random

import pytest
import torch
from torch.nn import functional as F

from everlong.attention.call_notes import tensors_in
from everlong.attention.call_tape import CallTapes
from everlong.errors import UnsupportedUseError

X = torch.tensor([[1.0, -2.0, 3.0, 0.5]])
INDEX = torch.tensor([2, 0])


def recorded(run):
    """Record `run`, which works on the tensor it is given, and return how many calls repeat it, and how."""
    given = X.clone()
    replay, result = CallTapes().record(lambda: run(given))
    calls = replay.__closure__[0].cell_contents
    return given, replay, result, calls


STEPS = {
    "arithmetic": lambda x: (2 - x) * x / 3 + x.abs().sqrt(),
    "in place": lambda x: x.mul(2).add_(1).clamp_(max=3).relu_(),
    "views": lambda x: x.view(2, 2).T[1:].reshape(-1) + 1,
    "sequences in and out": lambda x: torch.cat([*x.split(2, -1)][::-1], -1) * x.chunk(2, -1)[0].sum(),
    "several outputs": lambda x: torch.topk(x, 2)[0] + x.max(dim=-1, keepdim=True)[0],
    "dtypes": lambda x: (x.to(torch.bfloat16) * 3).float() + x.double().to(torch.float32),
    "activations": lambda x: F.silu(x) * F.gelu(x, approximate="tanh") + F.relu(x, inplace=False),
    "products": lambda x: F.linear(x, torch.ones(3, 4)) @ torch.ones(3, 2),
    "made anew": lambda x: x.new_ones(4) * x + torch.zeros(1),
    "parts written": lambda x: x.clone().index_fill_(1, torch.tensor([1]), 9.0) + x.roll(1, -1),
    "set by index": lambda x: _set(x * 1),
    "as it is": lambda x: x.to(torch.float32).contiguous() * 1,
    "an embedding": lambda x: F.embedding(x.clamp(0, 2).long(), torch.arange(12.0).view(3, 4)).sum(1),
    "numbers seen as others": lambda x: F.embedding(torch.tensor([1]), x.T * 2).view(torch.int32).float(),
    "conjugates": lambda x: (y := torch.complex(x, x * 2)) * (y * 3).conj() + y.conj().imag + y.imag,
    "named outputs": lambda x: torch.stack(torch.aminmax(x * 3, dim=1)),
    "nought, and not always": lambda x: x.abs().long() // 4 + 0,
    "a result that is a view": lambda x: (x + 1)[:, 1:],
}


def _set(x):
    x[:, 1] = x[:, 0] * 5
    return x


@pytest.mark.parametrize("step", STEPS)
def test_what_is_repeated_is_what_is_computed_of_other_numbers(step):
    given, replay, result, _ = recorded(STEPS[step])
    for numbers in (-X, X.roll(1, -1), X * 0.25, X * 10):
        given.copy_(numbers)
        replay()
        torch.testing.assert_close(result, STEPS[step](numbers.clone()), atol=0, rtol=0)


def test_what_is_written_to_is_written_to_again():
    held = torch.zeros(1, 4)
    given, replay, _, _ = recorded(lambda x: held.narrow(1, 0, 2).copy_(x[:, :2]) + 1)
    given.copy_(-X)
    held.zero_()
    replay()
    assert held.tolist() == [[-1.0, 2.0, 0.0, 0.0]]


def test_views_and_what_nobody_needs_are_left_out():
    def run(x):
        x.exp().sum()
        x.new_ones(7)
        return x.view(4).narrow(0, 0, 2) + 1

    assert len(recorded(run)[3]) == 1


def test_nothing_is_allocated_where_pytorch_can_write_in_place():
    given, replay, result, _ = recorded(lambda x: (x * 2 + x).exp())
    at = result.data_ptr()
    replay()
    assert result.data_ptr() == at
    assert torch.equal(result, (given * 3).exp())


def _layers(x, count=12):
    """Layers whose outputs are added to what goes through all of them."""
    for number in range(count):
        halves = (x * 2).split(2, -1)
        mixed = torch.cat([halves[1].tanh(), halves[0]], -1) + number
        x = x + F.silu(mixed).mul_(0.5) * x.abs()
    return x


def test_outputs_that_are_not_needed_at_once_lie_in_the_same_memory():
    given, replay, result, calls = recorded(_layers)
    arguments = (call.args + (call.keywords.get("out"),) for call in calls)
    places = {x.data_ptr() for x in tensors_in(list(arguments))}
    assert len(places) < 12, "as many as one layer needs"
    assert len(calls) - len(set(map(id, calls))) > len(calls) // 2, "layers repeat the same calls"
    for numbers in (-X, X.roll(1, -1)):
        given.copy_(numbers)
        replay()
        torch.testing.assert_close(result, _layers(numbers), atol=0, rtol=0)


CHAINED = [
    lambda first, second: first + second,
    lambda first, second: torch.cat([first[:, 2:], second[:, :2]], -1),
    lambda first, _: torch.special.erf(first),
    lambda first, _: first.flip(-1)[:, :4],
    lambda first, _: F.embedding(first.abs().long().clamp(max=3)[0], X.T).T,
    lambda first, second: second.mul_(0.5),
    lambda first, second: second[:, 1:3].add_(first[:, :2] * 1),
]


@pytest.mark.parametrize("seed", range(20))
def test_any_chain_of_calls_is_repeated_right(seed):
    def run(x):
        draw, made = random.Random(seed), [x, x * 2]
        for _ in range(40):
            output = draw.choice(CHAINED)(draw.choice(made), draw.choice(made[1:]))
            if output.shape == x.shape:
                made.append(output)
        return made[-1] + made[len(made) // 2]

    given, replay, result, _ = recorded(run)
    for numbers in (-X, X.roll(1, -1), X * 3):
        given.copy_(numbers)
        replay()
        torch.testing.assert_close(result, run(numbers.clone()), atol=0, rtol=0)


def test_what_somebody_else_holds_on_to_is_left_alone():
    held = []

    def run(x):
        x = x + 1
        held.append(x * 2)
        x = x + held[0]
        held.append((x * 3)[:, 1:])
        held.append(F.embedding(torch.tensor([1, 2]), x.T))
        held.append(torch.aminmax(x * 1, dim=1)[0])
        return (x * 4) * (x * 5) + held[1].sum() + held[2].tanh().sum() + held[3]

    given, replay, _, _ = recorded(run)
    given.copy_(-X)
    replay()
    assert torch.equal(held[0], (1 - X) * 2)
    assert torch.equal(held[1], ((1 - X) * 9)[:, 1:])
    assert torch.equal(held[2], ((1 - X) * 3).T[1:3])
    assert torch.equal(held[3], ((1 - X) * 3).amin(1))


def test_what_only_the_next_call_reads_is_handed_on_to_it():
    def run(x):
        return F.embedding(INDEX, x.T * 2).tanh()

    given, replay, result, calls = recorded(run)
    assert len(calls) == 2, "doubled; and looked up, which no tensor can be given for, on the way to the rest"
    assert len(recorded(lambda x: (rows := F.embedding(INDEX, x.T * 2)).tanh() + rows)[3]) == 4
    given.copy_(X.roll(1, -1))
    replay()
    assert torch.equal(result, run(given))


@pytest.mark.parametrize(
    ("run", "calls_left"),
    [
        (lambda x: torch.topk(x, 4)[0].view(2, 2) @ X.view(2, 2), 1),
        (lambda x: torch.topk(x, 4)[1].view(2, 2).float().exp(), 2),
        (lambda x: F.embedding(INDEX, x.T).view(1, 2).exp(), 1),
        (lambda x: torch.topk(x, 4)[0].view(2, 2).T @ X.view(2, 2), 2),
        (lambda x: torch.topk(x, 4)[0][:, 1:].exp(), 2),
        (lambda x: (found := torch.topk(x, 4))[0] * found[1], 2),
        (lambda x: (found := torch.topk(x, 4)[0]).view(2, 2) @ found.view(2, 2), 2),
        (lambda x: (F.embedding(INDEX, torch.complex(x, x * 2).T).view(1, 2).conj() * 1).imag + 0, 5),
    ],
    ids=[
        "in another shape",
        "a later one",
        "a single one",
        "turned",
        "a part of it",
        "both",
        "read twice",
        "conjugate",
    ],
)
def test_one_of_several_outputs_is_handed_on_whole_or_kept(run, calls_left):
    given, replay, result, calls = recorded(run)
    assert len(calls) == calls_left
    for numbers in (-X, X.roll(1, -1)):
        given.copy_(numbers)
        replay()
        torch.testing.assert_close(result, run(numbers), atol=0, rtol=0)


def test_weights_may_change_and_move():
    weight = torch.nn.Parameter(torch.ones(2, 4))
    given, replay, result, _ = recorded(lambda x: F.linear(x, weight))
    with torch.no_grad():
        weight.mul_(2)
    replay()
    assert torch.equal(result, F.linear(X, torch.full((2, 4), 2.0)))
    weight.data = torch.full((2, 4), 5.0)
    replay()
    assert torch.equal(result, F.linear(X, torch.full((2, 4), 5.0)))


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x * x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x * float(x[0, 0]),
        lambda x: x + x.tolist()[0][0],
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0)[0],
        lambda x: x.repeat_interleave(x[0].long().clamp(min=0), 1),
        lambda x: (x * 1).t_().sum(),
        lambda x: torch.topk(x, 2, out=(x.new_empty(1, 2), torch.empty(1, 2, dtype=torch.long)))[0],
        lambda x: torch._foreach_add_([x * 1], 1) or x,
        lambda x: torch.histogramdd(x.view(2, 2), [2, 2])[0],
    ],
    ids=[
        *("if", "item", "mask", "float", "tolist", "nonzero", "where", "repeat_interleave"),
        *("in another shape", "several given to write to", "a list written to", "lists in a list"),
    ],
)
def test_what_depends_on_numbers_or_changes_more_than_one_is_refused(look):
    with pytest.raises(UnsupportedUseError, match="cannot be recorded"):
        recorded(look)


def test_a_function_of_the_same_name_that_does_something_else_is_not_taken(monkeypatch):
    tried = []

    def roll(x, *_, out):
        tried.append(x)
        return out.copy_(x)

    monkeypatch.setattr(torch._C._nn, "roll", roll, raising=False)
    given, replay, result, _ = recorded(lambda x: x.roll(1, -1))
    given.copy_(-X)
    replay()
    assert tried and torch.equal(result, -X.roll(1, -1))
