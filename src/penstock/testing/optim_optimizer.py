"""The law of ``optim.optimizer``.

Bugs that its clauses are there to catch:

- limit: another update than the paper's: a wrong sign, order of decay and step, momentum, scale or epsilon.
- groups: a parameter that is left out or updated twice; state that is no tensor, so that a checkpoint loses it.
- zero rate: decay or steps that the schedule does not reach.
- no gradient: a parameter that moves, or an update that fails, where a layer was not used.
- gradients: what is put into them, so that a step which is undone is made again with others.
- round trip: state outside of ``optimizer.state``, and a resumed run that goes another way.
- independence, stack: norms taken over too many dimensions; batches of matrices that are mixed up; stacks of experts
  that are taken for one matrix, or do not decay.
- shards: what needs a whole matrix, and takes the rows that a process has for one.
- parts: what says that it is elementwise, and looks at a matrix, a row or a column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from penstock.core.randomness import torch_generator
from penstock.testing.sharded import on_shards
from penstock.train.checkpoint import optimizer_tensors, restore_optimizer
from penstock.train.optim.contract import Optimizer

Parameters = dict[str, nn.Parameter]

#: Names and shapes as in a Decoder: twins of one shape, wide and tall matrices, a stack of experts, norms, embedding.
SHAPES = {
    "embedding.weight": (20, 8),
    "layers.0.attention.qkv.weight": (16, 8),
    "layers.0.attention_norm.weight": (8,),
    "layers.0.mlp.gate_up": (3, 10, 8),
    "layers.0.mlp.router.weight": (3, 8),
    "layers.1.attention.qkv.weight": (16, 8),
    "layers.1.mlp.down.weight": (8, 24),
    "norm.weight": (8,),
}

#: The same for a limiting case: one matrix of a shape, since those that are batched may round differently.
SINGLE_SHAPES = {
    name: shape
    for name, shape in SHAPES.items()
    if name not in ("layers.1.attention.qkv.weight", "layers.0.mlp.gate_up")
}


def check(options: Optimizer) -> None:
    """Asserts the law of ``optim.optimizer`` with the given options, and in the limiting case of its kind."""
    check_limit(options)
    check_groups(options)
    check_zero_rate(options)
    check_no_gradient(options)
    check_gradients(options)
    check_round_trip(options)
    check_independence(options)
    check_stack(options)
    check_shards(options)
    check_parts(options)


def check_limit(options: Optimizer, updates: int = 5) -> None:
    """In the limiting case that the policy gives, the new optimizer and the known one make the same updates, bit for
    bit."""
    limit = options.limit()
    ours, theirs = parameters(SINGLE_SHAPES), parameters(SINGLE_SHAPES)
    run([limit.optimizer.build(ours)], ours, updates)
    run(limit.known(theirs), theirs, updates)
    assert_equal(ours, theirs)
    for name, initial in parameters(SINGLE_SHAPES).items():
        assert not torch.equal(theirs[name], initial), f"the known optimizer does not move {name}"


def check_groups(options: Optimizer) -> None:
    """Each parameter is in one group, each group has its peak rate, and all state is tensors, filed by parameter."""
    own = parameters()
    optimizer = options.build(own)
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(listed) == sorted(map(id, own.values()))
    assert all(group["lr"] > 0 for group in optimizer.param_groups)
    run([optimizer], own, 2)
    assert {id(p) for p in optimizer.state} == set(listed)
    for entries in optimizer.state.values():
        assert entries, "a parameter was updated without any state"
        assert all(isinstance(value, Tensor) for value in entries.values()), list(entries)


def check_zero_rate(options: Optimizer) -> None:
    """With the rate 0 no weight moves."""
    own = parameters()
    optimizer = options.build(own)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    run([optimizer], own, 3)
    assert_equal(own, parameters())


def check_no_gradient(options: Optimizer) -> None:
    """A parameter without a gradient stays as it is, and the others move."""
    own, still = parameters(), "layers.0.attention.qkv.weight"
    optimizer = options.build(own)
    run([optimizer], own, 2, without=still)
    for name, initial in parameters().items():
        assert torch.equal(own[name], initial) == (name == still), name


def check_gradients(options: Optimizer) -> None:
    """Gradients are not changed."""
    own = parameters()
    run([options.build(own)], own, 1)
    for name, parameter in own.items():
        assert parameter.grad is not None and torch.equal(parameter.grad, _gradient(name, parameter, 0)), name


def check_round_trip(options: Optimizer) -> None:
    """State that goes through a checkpoint's tensors into a new optimizer continues bit for bit."""
    straight, resumed = parameters(), parameters()
    first = options.build(straight)
    run([first], straight, 3)
    tensors = {key: value.clone() for key, value in optimizer_tensors(first, _names(straight)).items()}
    with torch.no_grad():
        for name, parameter in resumed.items():
            parameter.copy_(straight[name])
    second = options.build(resumed)
    restore_optimizer(second, _names(resumed), tensors)
    run([first], straight, 3, start=3)
    run([second], resumed, 3, start=3)
    assert_equal(resumed, straight)


def check_independence(options: Optimizer) -> None:
    """A parameter's updates do not depend on its neighbours; what is batched may round differently, in bf16."""
    together = parameters()
    run([options.build(together)], together, 3)
    for name, shape in SHAPES.items():
        alone = parameters({name: shape})
        run([options.build(alone)], alone, 3)
        _assert_same_move(together[name], alone[name], parameters()[name])


def check_stack(options: Optimizer) -> None:
    """A stack of matrices is updated as its matrices are."""
    name, shape = "layers.0.mlp.gate_up", SHAPES["layers.0.mlp.gate_up"]
    stack = parameters({name: shape})
    matrices = {f"{name}.{i}": nn.Parameter(m.clone()) for i, m in enumerate(stack[name].detach())}
    initial = stack[name].detach().clone()
    whole, parts = options.build(stack), options.build(matrices)
    for step in range(3):
        gradients = stack[name].grad = _gradient(name, stack[name], step)
        for part, gradient in zip(matrices.values(), gradients, strict=True):
            part.grad = gradient.clone()
        whole.step()
        parts.step()
    _assert_same_move(stack[name], torch.stack(list(matrices.values())), initial)


def check_shards(options: Optimizer) -> None:
    """Parameters of which two processes have some rows each are updated as whole ones are."""
    alone = parameters()
    run([options.build(alone)], alone, 3)

    def work(divided: Callable[[Tensor], DTensor]) -> list[str]:
        own = {name: nn.Parameter(divided(parameter.detach())) for name, parameter in parameters().items()}
        optimizer = options.build(own)
        for step in range(3):
            for name, parameter in own.items():
                parameter.grad = divided(_gradient(name, alone[name], step))
            optimizer.step()
        complaints = []
        for name, parameter in own.items():
            try:
                _assert_same_move(cast(DTensor, parameter.data).full_tensor(), alone[name], parameters()[name])
            except AssertionError:
                complaints.append(f"rows of {name} move elsewhere than the whole")
        return complaints

    complaints = on_shards(work)
    assert not complaints, "; ".join(complaints)


def check_parts(options: Optimizer) -> None:
    """Of a policy that says that it is elementwise, halves of parameters are updated as the whole ones are."""
    if not options.elementwise:
        return
    whole = parameters()
    run([options.build(whole)], whole, 3)
    for axis in (0, -1):
        for half in (0, 1):
            own = {name: nn.Parameter(p.detach().chunk(2, axis)[half].clone()) for name, p in parameters().items()}
            optimizer = options.build(own)
            for step in range(3):
                for name, parameter in own.items():
                    parameter.grad = _gradient(name, whole[name], step).chunk(2, axis)[half].clone()
                optimizer.step()
            for name, parameter in own.items():
                _assert_same_move(parameter, whole[name].chunk(2, axis)[half], parameters()[name].chunk(2, axis)[half])


def parameters(shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> Parameters:
    """Parameters of the given shapes, each a function of its name."""
    return {
        name: nn.Parameter(torch.randn(shape, generator=torch_generator(0, f"testing/{name}")))
        for name, shape in shapes.items()
    }


def run(
    optimizers: Sequence[torch.optim.Optimizer], own: Parameters, updates: int, *, start: int = 0, without: str = ""
) -> None:
    """Makes ``updates`` with gradients that are functions of name and step, none for the parameter ``without``."""
    for step in range(start, start + updates):
        for name, parameter in own.items():
            parameter.grad = None if name == without else _gradient(name, parameter, step)
        for optimizer in optimizers:
            optimizer.step()


def assert_equal(ours: Parameters, theirs: Parameters) -> None:
    """Every parameter is equal bit for bit."""
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name]), f"{name} differs"


def _gradient(name: str, parameter: Tensor, step: int) -> Tensor:
    return torch.randn(parameter.shape, generator=torch_generator(1, f"testing/{name}", step))


def _names(own: Parameters) -> dict[int, str]:
    return {id(parameter): name for name, parameter in own.items()}


def _assert_same_move(ours: Tensor, theirs: Tensor, initial: Tensor) -> None:
    """Both moved alike: within 2 percent of the longest move of a weight, what a few bf16 products may differ by."""
    moved = (theirs - initial).abs().max()
    assert moved > 0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02 * moved.item())
