"""Acceptance of 1 to 8 drafts by every verifier, beside the optimum: python-1m drafts for python-6m on held-out Python.

Nothing is timed. At each place the acceptance is the probability, given what was drafted, that the token that comes out
is one of the drafts; a repetition draws anew at all places. Verifiers work in float32, as in an engine, the optimum is
computed in float64.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from penstock.core.bench import Bench
from penstock.core.randomness import derive, uniforms
from penstock.data.building import is_held_out
from penstock.data.corpora.stdlib import StandardLibrary
from penstock.models import hub
from penstock.models.attention import CausalRows
from penstock.models.sampling import Sampling, probabilities
from penstock.policy import create, index
from penstock.speculate.bound import optimal_acceptance
from penstock.speculate.drafting import Drafting, draw_drafts
from penstock.speculate.expected import chain_tokens
from penstock.speculate.verifiers.contract import Verifier

MOST = 8
FILES = 48
WINDOW, SPACING = 256, 32  # tokens of a document that are read, and from place to place
REPETITIONS = 3
PIECE = 8  # places whose optimum is computed at a time, for what is computed to stay in the processor's cache
TEMPERATURES = (1.0, 0.6)

#: What papers claim of a verifier beside their own baseline: (subject, peer, drafts of the peer or as many, papers).
CLAIMS = (
    ("k_seq", "accept_residual", 1, (306,)),
    ("importance", "k_seq", None, (50,)),
    ("importance", "recursive", None, (50,)),
    ("greedy_drafts", "recursive_distinct", None, (316,)),
    ("optimum, distinct drafts", "optimum, independent drafts", None, (316,)),
)


@torch.inference_mode()
def scores(name: str, texts: list[list[int]], device: torch.device) -> Tensor:
    """The model's scores float64 [places, vocabulary] of what follows at every place of the texts."""
    model = hub.load(name, device=device, dtype=torch.float32).eval()
    tokens = torch.tensor(texts, device=device)
    hidden = model(tokens, CausalRows.of(WINDOW, device)).hidden[:, SPACING - 1 :: SPACING]
    return model.logits(hidden).flatten(0, 1).double()


def held_out(count: int) -> list[list[int]]:
    """The first tokens of ``count`` files that both models have not seen."""
    tokenizer = hub.load_tokenizer("python-6m")
    assert tokenizer.get_vocab() == hub.load_tokenizer("python-1m").get_vocab()
    texts = (d.text for d in StandardLibrary(tests=True).documents() if is_held_out(d.text, 0.05))
    encoded = (tokenizer(text)["input_ids"][:WINDOW] for text in texts)
    return list(itertools.islice((ids for ids in encoded if len(ids) == WINDOW), count))


def acceptance(verifier: Verifier, target: Tensor, proposal: Tensor, count: int, repetition: int) -> float:
    """The mean over all places, of one draw of ``count`` drafts at each."""
    numbers = np.arange(len(target) * count).reshape(-1, count)
    uniform = torch.from_numpy(uniforms(derive(0, "bench/verifiers", repetition), numbers)).to(target.device)
    drafted = draw_drafts(proposal, count, verifier.drafting, uniform)
    chances = verifier.chances(target, proposal, drafted)
    hit = torch.zeros_like(chances, dtype=torch.bool).scatter(-1, drafted.where(drafted >= 0, drafted[:, :1]), True)
    return float((chances * hit).sum(-1).mean())


def main(bench: Bench) -> None:
    """Measures all verifiers at each temperature."""
    texts = held_out(1 if bench.quick else FILES)
    target, draft = (scores(name, texts, bench.device) for name in ("python-6m", "python-1m"))
    for temperature in TEMPERATURES[: 1 if bench.quick else None]:
        chances = [probabilities(each, Sampling(temperature=temperature)) for each in (target, draft)]
        measure(bench, temperature, *chances, repetitions=2 if bench.quick else REPETITIONS)


def measure(bench: Bench, temperature: float, target: Tensor, proposal: Tensor, repetitions: int) -> None:
    """The rows of one temperature."""
    metric = f"acceptance at temperature {temperature:g}"
    common = {"metric": metric, "unit": ""}
    found: dict[tuple[str, int], list[float]] = {}
    for drafting in Drafting:
        pieces = zip(target.split(PIECE), proposal.split(PIECE), strict=True)
        best = torch.cat([optimal_acceptance(*pair, MOST, drafting) for pair in pieces]).mean(0)
        for count, value in enumerate(best.tolist(), 1):
            name = f"optimum, {drafting} drafts"
            found[name, count] = [value] * repetitions
            bench.row(subject=name, setting=drafts(count), value=value, **common)
    target, proposal = target.float(), proposal.float()
    for name in index().names("speculate.verifier"):
        verifier = create("speculate.verifier", name)
        assert isinstance(verifier, Verifier)
        for count in range(1, 1 + (verifier.most or MOST)):
            values = [acceptance(verifier, target, proposal, count, number) for number in range(repetitions)]
            found[name, count] = values
            peer = f"optimum, {verifier.drafting} drafts"
            compare(bench, name, peer, count, values, found[peer, count], metric)
    for subject, peer, own, papers in CLAIMS:
        for count in range(2, 1 + MOST):
            values, theirs = found[subject, count], found[peer, own or count]
            compare(bench, subject, f"{peer}, one draft" if own else peer, count, values, theirs, metric, papers)
    tokens = [chain_tokens(value, 4) for value in found["accept_residual", 1]]
    bench.row(
        subject="accept_residual",
        setting=f"a chain of 4, each accepted alike, temperature {temperature:g}",
        metric="tokens a pass of the target",
        unit="",
        value=float(np.median(tokens)),
        peer="plain decoding",
        peer_value=1.0,
        ratio=float(np.median(tokens)),
        papers=(63,),
        simulated=True,
    )


def compare(
    bench: Bench,
    subject: str,
    peer: str,
    count: int,
    values: list[float],
    peer_values: list[float],
    metric: str,
    papers: tuple[int, ...] = (),
) -> None:
    """A row that sets one acceptance beside another."""
    bench.compared(
        subject=subject,
        peer=peer,
        setting=drafts(count),
        metric=metric,
        unit="",
        values=values,
        peer_values=peer_values,
        papers=papers,
    )


def drafts(count: int) -> str:
    """A number of drafts in words."""
    return f"{count} draft{'s' if count > 1 else ''}"
