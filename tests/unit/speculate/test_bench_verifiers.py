"""The benchmark `speculate_verifiers`, on small random distributions instead of two models."""

from __future__ import annotations

import pytest
import torch

from penstock.core.bench import Bench, load
from penstock.core.randomness import torch_generator
from penstock.policy import index


@pytest.fixture(scope="module")
def rows():
    """What it measures of 8 places with a vocabulary of 20."""
    script = load("speculate_verifiers")
    bench = Bench("speculate_verifiers", torch.device("cpu"), quick=True)
    bench.console.quiet = True
    generator = torch_generator(0, "test/bench_verifiers")
    both, one, other = torch.randn(3, 8, 20, generator=generator, dtype=torch.float64)
    script.measure(bench, 1.0, (both + one).softmax(-1), (both + other).softmax(-1), repetitions=2)
    return bench.rows


def test_every_verifier_stands_beside_the_optimum_of_its_drafts(rows):
    beside = [row for row in rows if row.peer is not None and row.peer.startswith("optimum") and not row.papers]
    assert {row.subject for row in beside} == set(index().names("speculate.verifier"))
    assert all(row.ratio < 1.3 for row in beside)  # a few drafts may be luckier than the mean of all
    assert sum(row.subject == "k_seq" for row in beside) == 8


def test_each_claim_names_its_paper_and_baseline(rows):
    assert {(row.subject, row.peer, *row.papers) for row in rows if row.papers} == {
        ("accept_residual", "plain decoding", 63),
        ("k_seq", "accept_residual, one draft", 306),
        ("importance", "k_seq", 50),
        ("importance", "recursive", 50),
        ("greedy_drafts", "recursive_distinct", 316),
        ("optimum, distinct drafts", "optimum, independent drafts", 316),
    }
    assert [row.simulated for row in rows if 63 in row.papers] == [True]
