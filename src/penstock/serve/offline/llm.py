"""Generation in this process: prompts in, results out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from penstock.core.config import build
from penstock.core.errors import UsageError
from penstock.core.progress import Reporter, show
from penstock.core.signals import StopRequest
from penstock.models import hub
from penstock.models.encoders.pooling import Pooling
from penstock.serve.chat import chat_prompt, with_place
from penstock.serve.choose.logprobs import TokenLogprobs
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.embed.embedder import Embedder
from penstock.serve.embed.judge import Judge, open_judge
from penstock.serve.messages import Request
from penstock.serve.offline.embedders import embedder_of
from penstock.serve.offline.gather import Gatherer, RequestOutput
from penstock.serve.opening import open_engine

#: A prompt: text, tokens, or a table with ``prompt`` or ``prompt_token_ids``.
Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]

#: A text that stands beside a prompt, or its tokens.
Context = str | Sequence[int]


class LLM:
    """A model with an engine around it, for batches of prompts::

        llm = LLM("python-6m")
        for result in llm.generate(["def add(", "class Stack:"], SamplingParams(max_tokens=32)):
            print(result.prompt, result.outputs[0].text)

    With ``LLM("python-6m", adapters={"sql": "runs/sql"})``, ``llm.generate(prompts, adapter="sql")`` answers by an
    adapter. Its methods and results have the shape that vLLM's users know.

    Args:
        model: whatever ``hub.resolve`` takes: a model or run folder, a boxed model, a hub name.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        progress: how to report what takes long at the start, on a GPU; ``core.progress.silent`` is quiet.
        rerank_template, rerank_answers: how it judges documents in :meth:`score`, where its folder does not say so; see
            :func:`~penstock.serve.embed.judge.open_judge`.
        options: those of :class:`~penstock.serve.config.EngineConfig`.

    Raises:
        PenstockError: the model cannot be had or does not fit, or an option is wrong.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: str = "auto",
        progress: Reporter = show,
        rerank_template: Path | None = None,
        rerank_answers: tuple[str, str] | None = None,
        **options: Any,
    ) -> None:
        config = build(EngineConfig, options, "the engine's options")
        self._folder = folder = hub.resolve(model)
        self.tokenizer = hub.load_tokenizer(folder)
        self._judge = open_judge(folder, self.tokenizer, rerank_template, rerank_answers)
        self.engine = open_engine(folder, config, device, progress, self.tokenizer)
        self._gatherer = Gatherer(self.engine, self.tokenizer)
        self._count = 0

    def close(self) -> None:
        """Ends the engine, and the processes of other ranks where there are some; so does the end of this process."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        contexts: Sequence[Context] | Sequence[Sequence[Context]] = (),
        prefix: str = "",
        adapter: str | Sequence[str] = "",
        progress: Reporter = show,
    ) -> list[RequestOutput]:
        """Continues ``prompts``, one or several; the results come in their order. A request that fails on the way has
        an ``error``, and its continuations the ``finish_reason`` "error"; the others are as if it had not been there.

        Args:
            sampling_params: for all of them, or one for each.
            contexts: texts, such as documents that were found, that stand before each prompt, just as they are; or
                a list of them for each. How they are encoded, and when they are not computed again, is the engine's
                option ``kv_reuse``; see docs/cache.md.
            prefix: what stands before the contexts.
            adapter: the name of the adapter for all of them, or one for each; the empty one is the model alone.
            progress: how to report; ``core.progress.silent`` is quiet.

        Raises:
            UsageError: a prompt does not fit, there is no such adapter, or there are not as many sampling params or
                adapters as prompts. Nothing is generated then.
            KeyboardInterrupt: after Ctrl-C; the engine is free for the next call.
        """
        texts, tokens = self._tokenized(prompts, not contexts)
        before = self._encoded(prefix) if contexts else []
        beside = [(each, len(before)) for each in self._beside(contexts, len(tokens))]
        return self._run(texts, [[*before, *each] for each in tokens], sampling_params, adapter, progress, beside)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        contexts: Sequence[Context] | Sequence[Sequence[Context]] = (),
        adapter: str | Sequence[str] = "",
        progress: Reporter = show,
    ) -> list[RequestOutput]:
        """The assistant's next message in a conversation, or in each of several.

        ``messages`` have a ``role`` and a ``content``; the model's chat template turns them into a prompt. ``contexts``
        stand before the text of the user's first message. The other arguments and the errors are those of
        :meth:`generate`.
        """
        several = [messages] if all(isinstance(each, Mapping) for each in messages) else messages
        placed = [with_place(each) if contexts else each for each in several]  # type: ignore[arg-type]
        prompts = [chat_prompt(self.tokenizer, each, tools) for each in placed]  # type: ignore[arg-type]
        texts = [self.tokenizer.decode(each.tokens) for each in prompts]
        pairs = zip(self._beside(contexts, len(prompts)), prompts, strict=True)
        beside = [(each, prompt.shared) for each, prompt in pairs]
        return self._run(texts, [each.tokens for each in prompts], sampling_params, adapter, progress, beside)

    def embed(
        self,
        texts: str | Sequence[str | Sequence[int]],
        *,
        pooling: Pooling | None = None,
        dimensions: int | None = None,
        truncate: bool = False,
        progress: Reporter = show,
    ) -> Tensor:
        """The vectors float32 [n, hidden] of ``texts``: their hidden states after the model's last norm, pooled
        as ``pooling`` or else the folder says, and else by the last token.

        Encoders, which generate nothing, are for :func:`~penstock.serve.embed.embedder.open_embedder`. The other
        arguments and the errors are those of :meth:`~penstock.serve.embed.embedder.Embedder.embed`.
        """
        return self._embedder(pooling).embed(texts, dimensions=dimensions, truncate=truncate, progress=progress)

    def score(
        self,
        queries: str | Sequence[str],
        texts: str | Sequence[str],
        *,
        pooling: Pooling | None = None,
        instruction: str | None = None,
        progress: Reporter = show,
    ) -> Tensor:
        """How near texts are to queries, float32 [queries, texts]: p(yes) / (p(yes) + p(no)) of what a model that
        judges documents would answer, see :class:`~penstock.serve.embed.judge.Judge`; of any other, and where
        ``pooling`` is given, the cosines of their vectors.

        Args:
            instruction: what makes a text an answer, for models that judge, in place of their own.

        Raises:
            UsageError: a pair is too long, or there is an instruction, and the model takes none.
        """
        if self._judge is not None and pooling is None:
            one, other = ([each] if isinstance(each, str) else list(each) for each in (queries, texts))
            return self._judged(self._judge, one, other, instruction, progress)
        if instruction is not None:
            raise UsageError("this model takes no instruction: it compares texts as they are")
        return self._embedder(pooling).score(queries, texts, progress=progress)

    def pause(self) -> None:
        """Nothing is generated until :meth:`resume`: requests of :meth:`as_completed` that are under way wait."""
        self.engine.control.pause()

    def resume(self) -> None:
        """Goes on after :meth:`pause`, with the same tokens as if there had been none."""
        self.engine.control.resume()

    def sleep(self) -> None:
        """Frees the memory of the model and of its cache; see
        :meth:`~penstock.serve.engine.control.EngineControl.sleep`."""
        self.engine.control.sleep()

    def wake(self) -> None:
        """Brings back what :meth:`sleep` freed."""
        self.engine.control.wake()

    def load(self, weights: Mapping[str, Tensor] | str | Path, version: int | None = None) -> int:
        """Puts other weights in the place of the model's: those of a folder (whatever ``hub.resolve`` takes), or
        tensors by name, such as ``decoder.state_dict()`` of a trainer in this process. Returns their version, which
        results have as ``weights_version``.

        Raises:
            UsageError, ModelError: they are not weights of such a model. Nothing has changed then.
        """
        return self.engine.control.load(weights if isinstance(weights, Mapping) else hub.resolve(weights), version)

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Loads the LoRA adapter of ``folder``, which PEFT or a run has written; see
        :meth:`~penstock.serve.engine.adapters.Adapters.load`."""
        self.engine.adapters.load(name, folder)

    def drop_adapter(self, name: str) -> None:
        """No prompt can name the adapter any more; its slot is free once none that has it is under way."""
        self.engine.adapters.drop(name)

    def _judged(
        self, judge: Judge, queries: list[str], texts: list[str], instruction: str | None, progress: Reporter
    ) -> Tensor:
        prompts = [judge.template.prompt(query, text, instruction) for query in queries for text in texts]
        if not prompts:
            return torch.zeros(len(queries), len(texts))
        rounds = judge.rounds(len(prompts))
        questions = next(rounds)
        while True:
            tokens, params = [prompts[place] for place, _ in questions], [sampling for _, sampling in questions]
            results = self.generate(tokens, params, progress=progress)
            try:
                questions = rounds.send([_first(each) for each in results])
            except StopIteration as done:
                return torch.tensor(done.value).sigmoid().view(len(queries), len(texts))

    def _embedder(self, pooling: Pooling | None) -> Embedder:
        return embedder_of(self.engine, self._folder, self.tokenizer, pooling)

    def _run(
        self,
        texts: Sequence[str | None],
        tokens: Sequence[list[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        adapter: str | Sequence[str],
        progress: Reporter,
        beside: Sequence[tuple[list[list[int]], int]],
    ) -> list[RequestOutput]:
        chosen = sampling_params or SamplingParams()
        params = [chosen] * len(tokens) if isinstance(chosen, SamplingParams) else list(chosen)
        params = [each.tokenized(self._encoded, self._bare) for each in params]
        if len(params) != len(tokens):
            raise UsageError(f"there are {len(tokens)} prompts, and {len(params)} sampling params")
        adapters = [adapter] * len(tokens) if isinstance(adapter, str) else list(adapter)
        if len(adapters) != len(tokens):
            raise UsageError(f"there are {len(tokens)} prompts, and {len(adapters)} adapters")
        results: dict[int, RequestOutput] = {}
        with StopRequest() as stop, progress("generating", len(tokens), "prompt") as bar:
            for place, result in self.as_completed(tokens, params, stop, texts=texts, beside=beside, adapters=adapters):
                results[place] = result
                bar.advance()
        if stop.wanted:
            raise KeyboardInterrupt
        return [results[place] for place in range(len(tokens))]

    def as_completed(
        self,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        stop: StopRequest,
        *,
        texts: Sequence[str | None] | None = None,
        beside: Sequence[tuple[list[list[int]], int]] | None = None,
        adapters: Sequence[str] | None = None,
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Continues ``prompts`` of tokens, and gives each one's place and result as soon as it is there. It ends early
        once ``stop`` is wanted, or when the caller leaves it: what has not finished then is dropped.

        Args:
            params: of each prompt.
            texts: the prompts as text, for the results.
            beside: the contexts of each, as tokens, and how many tokens of the prompt stand before them.
            adapters: the names of each prompt's; the empty one is the model alone.

        Raises:
            UsageError: a prompt does not fit, or there is no such adapter. Nothing is generated then.
        """
        places = {str(self._count + place): place for place in range(len(prompts))}
        self._count += len(prompts)
        try:
            told, others = texts or [None] * len(prompts), beside or [([], 0)] * len(prompts)
            names = adapters or [""] * len(prompts)
            for id, text, prompt, sampling, (contexts, shared), adapter in zip(
                places, told, prompts, params, others, names, strict=True
            ):
                request = Request(id, prompt, sampling, contexts=contexts, shared=shared, adapter=adapter)
                self._gatherer.submit(request, text)
            while self._gatherer.pending and not stop.wanted:
                if self.engine.control.stopped:
                    raise UsageError(
                        "the engine is asleep" if self.engine.control.asleep else "the engine is paused",
                        hint="Call wake() or resume() before it is to generate.",
                    )
                for result in self._gatherer.step():
                    yield places[result.request_id], result
        finally:
            self._gatherer.abandon()

    def _encoded(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def _bare(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def tokens(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt.

        Raises:
            UsageError: it is no prompt.
        """
        _, (tokens,) = self._tokenized(prompt)
        return tokens

    def _beside(self, contexts: Sequence[Context] | Sequence[Sequence[Context]], count: int) -> list[list[list[int]]]:
        """The tokens of the contexts of each of ``count`` prompts."""
        if isinstance(contexts, str) or any(isinstance(each, int) for each in contexts):
            raise UsageError("contexts are a list of texts, or such a list for each prompt", hint="contexts=[text]")
        common = all(_single(each) for each in contexts)
        several = [contexts] * count if common else contexts
        if len(several) != count:
            raise UsageError(f"there are {count} prompts, and {len(several)} lists of contexts")
        return [self._tokenized(list(each), False)[1] for each in several]  # type: ignore[arg-type]

    def _tokenized(
        self, prompts: Prompt | Sequence[Prompt], special: bool = True
    ) -> tuple[list[str | None], list[list[int]]]:
        """Text, where there is one, and tokens of each prompt, with those that the model wants around a text where it
        is ``special``."""
        texts: list[str | None] = []
        tokens: list[list[int]] = []
        for prompt in [prompts] if _single(prompts) else prompts:
            content = prompt
            if isinstance(prompt, Mapping):
                content = prompt.get("prompt_token_ids", prompt.get("prompt"))
            if isinstance(content, str):
                texts.append(content)
                tokens.append(self.tokenizer(content, add_special_tokens=special)["input_ids"])
            elif isinstance(content, Sequence) and all(isinstance(token, int) for token in content):
                texts.append(None)
                tokens.append([token for token in content if isinstance(token, int)])
            else:
                raise UsageError(
                    f"cannot read the prompt {prompt!r:.80}",
                    hint='Give text, a list of tokens, or {"prompt_token_ids": [...]}.',
                )
        return texts, tokens


def _first(result: RequestOutput) -> TokenLogprobs:
    """What a model that judges would say first.

    Raises:
        UsageError: it could say nothing.
    """
    told = result.outputs[0].logprobs
    if not told:
        raise UsageError(f"a pair cannot be judged: {result.error or result.outputs[0].finish_reason}")
    return told.rows[0]


def _single(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is one prompt, not several."""
    return isinstance(prompts, str | Mapping) or (len(prompts) > 0 and all(isinstance(each, int) for each in prompts))
