"""The law of ``moe.router``.

Bugs that its clauses are there to catch:

- the example: weights that are not normalised, not scaled, or of other experts; scores of another kind; a bias in the
  weights.
- routing: an expert twice; tokens that influence each other; a bias that does not choose, or that changes weights.
- block: tokens that go to another expert than their weight, gradients that do not reach router or experts.
- balance: a loss that falls as the load collapses, that is cut off from the router, or whose size depends on the number
  of experts or tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.core.randomness import torch_generator
from penstock.models.config import DecoderConfig, MoEConfig
from penstock.models.decoder import MixtureOfExperts
from penstock.models.routers.contract import Router, Routing

EXPERTS, HIDDEN, TOKENS = 5, 12, 17


def check(router: Router) -> None:
    """Asserts the law of ``moe.router`` on its example, and for every number of experts that a token may go to."""
    check_example(router)
    for top_k in range(1, EXPERTS + 1):
        candidate = router.model_copy(update={"top_k": top_k})
        check_routing(candidate)
        check_block(candidate)
        check_balance(candidate)


def check_example(router: Router) -> None:
    """For some tokens the weights are those that the policy gives."""
    example, logits, weights, bias = router.example()
    wanted = torch.tensor(weights, dtype=torch.float64)
    assert example.top_k < wanted.shape[1], "the example leaves nothing to choose"
    shift = None if bias is None else torch.tensor(bias, dtype=torch.float64)
    found = _dense(example.route(torch.tensor(logits, dtype=torch.float64), shift), wanted.shape[1])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def check_routing(router: Router) -> None:
    """Experts are distinct and exist, weights are not negative, probabilities sum to 1, and each token is routed on its
    own. A selection bias, where the router keeps one, moves the choice alone."""
    logits = _normal("logits", TOKENS, EXPERTS)
    routing = router.route(logits)
    assert routing.experts.shape == routing.weights.shape == (TOKENS, router.top_k)
    assert routing.experts.dtype == torch.int64
    assert ((routing.experts >= 0) & (routing.experts < EXPERTS)).all()
    assert all(len(set(row)) == router.top_k for row in routing.experts.tolist())
    assert (routing.weights >= 0).all()
    alone = [router.route(row.unsqueeze(0)) for row in logits]
    torch.testing.assert_close(torch.cat([r.weights for r in alone]), routing.weights, rtol=0, atol=1e-12)
    assert torch.equal(torch.cat([r.experts for r in alone]), routing.experts)
    assert (routing.probabilities >= 0).all()
    assert routing.probabilities.shape == logits.shape
    one = torch.ones(TOKENS, dtype=torch.float64)
    torch.testing.assert_close(routing.probabilities.sum(1), one, rtol=0, atol=1e-12)
    favourite = torch.zeros(EXPERTS, dtype=torch.float64)
    favourite[2] = 100.0
    biased = router.route(logits, favourite)
    if router.biased:
        assert (biased.experts == 2).any(1).all()
        everywhere = router.model_copy(update={"top_k": EXPERTS})
        torch.testing.assert_close(
            _dense(everywhere.route(logits, favourite)), _dense(everywhere.route(logits)), rtol=0, atol=1e-12
        )
    else:
        assert torch.equal(biased.experts, routing.experts)
        assert torch.equal(biased.weights, routing.weights)


def check_block(router: Router) -> None:
    """Output and gradients of the routed block equal, in float64, those of the loop over all experts."""
    block = small_block(router)
    x = _normal("input", TOKENS, HIDDEN).requires_grad_()
    probe = _normal("probe", TOKENS, HIDDEN)
    ours = _gradients(block, x, probe, block(x)[0])
    theirs = _gradients(block, x, probe, dense_block(block, x))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def check_balance(router: Router) -> None:
    """The loss for balance is 1 a token for an even load, more for one that collapses, and falls along its gradient."""
    block = small_block(router)
    block.router.weight.data = torch.eye(EXPERTS, HIDDEN, dtype=torch.float64)  # the logits are the first of the inputs
    if block.selection_bias is not None:
        block.selection_bias.data.zero_()
    row = _normal("balance", HIDDEN)

    def loss(x: Tensor) -> Tensor:
        balance: Tensor = block(x)[1] / len(x)
        return balance

    # Token i scores its experts as token 0 does, shifted by i: every expert gets as much as any other.
    even = torch.stack([torch.cat([row[:EXPERTS].roll(i), row[EXPERTS:]]) for i in range(EXPERTS)])
    torch.testing.assert_close(loss(even), torch.ones((), dtype=torch.float64), rtol=0, atol=1e-12)
    if router.top_k == EXPERTS:  # the load is always even
        return
    collapsed = row.expand(TOKENS, HIDDEN).clone().requires_grad_()
    before = loss(collapsed)
    assert before > 1, f"the loss for balance of a collapsed load is {before}"
    assert before.requires_grad, "the loss for balance has no gradient"
    (gradient,) = torch.autograd.grad(before, collapsed, allow_unused=True)
    assert gradient is not None, "the gradient of the loss for balance does not reach the router"
    assert loss(collapsed - 0.1 * gradient / gradient.abs().max()) < before, "the loss for balance rises"


def check_compiles(router: Router) -> None:
    """The block compiles to one graph, forward and backward, with eager's numbers."""
    results = []
    for compiled in (False, True):
        block, x = small_block(router), _normal("compiled", TOKENS, HIDDEN)
        out, balance = (torch.compile(block, fullgraph=True, backend="aot_eager") if compiled else block)(x)
        (out.square().sum() + balance).backward()
        results.append([out, balance, *(p.grad for p in block.parameters() if p.requires_grad)])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def small_block(router: Router) -> MixtureOfExperts:
    """A sparse block in float64 with random weights, a shared expert, and a selection bias where there is one."""
    moe = MoEConfig(experts=EXPERTS, ffn=7, router=router, shared_ffn=6, shared_gate=True)
    shape = DecoderConfig(vocabulary=3, hidden=HIDDEN, layers=1, heads=1, kv_heads=1, head_dim=2, ffn=4, moe=moe)
    block = MixtureOfExperts(shape, moe).double()
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.copy_(0.5 * _normal(name, *parameter.shape))
    return block


def dense_block(block: MixtureOfExperts, x: Tensor) -> Tensor:
    """The block by definition: every expert sees every token [N, hidden], weighted by the router, mostly with 0."""
    weights = _dense(block.policy.route(block.router(x), block.selection_bias), block.experts)
    out = torch.zeros_like(x)
    for expert in range(block.experts):
        gate, up = (x @ block.gate_up[expert].T).chunk(2, -1)
        out = out + weights[:, expert, None] * ((F.silu(gate) * up) @ block.down[expert].T)
    if block.shared is not None:
        gate, up = (x @ block.shared.gate_up.weight.T).chunk(2, -1)
        extra = (F.silu(gate) * up) @ block.shared.down.weight.T
        share = 1.0 if block.shared_gate is None else torch.sigmoid(x @ block.shared_gate.weight.T)
        out = out + share * extra
    return out


def _dense(routing: Routing, experts: int = EXPERTS) -> Tensor:
    """The weight of every expert for every token [N, experts]."""
    zeros = torch.zeros(len(routing.experts), experts, dtype=routing.weights.dtype)
    return zeros.scatter(1, routing.experts, routing.weights)


def _gradients(block: MixtureOfExperts, x: Tensor, probe: Tensor, out: Tensor) -> list[Tensor]:
    """``out``, and the gradients of its product with ``probe`` for the input and all trainable weights."""
    wanted = [x, *(p for p in block.parameters() if p.requires_grad)]
    return [out, *torch.autograd.grad((out * probe).sum(), wanted)]


def _normal(name: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch_generator(0, f"testing/router/{name}"), dtype=torch.float64)
