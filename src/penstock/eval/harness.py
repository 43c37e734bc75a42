"""lm-eval's tasks, in process on the engine: no server, and one continuous batch for all requests of a kind.

This module needs the package ``lm-eval`` (the extra ``eval``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.core.errors import PenstockError, UsageError
from penstock.core.progress import Reporter, show
from penstock.core.signals import StopRequest
from penstock.serve.chat import chat_prompt
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.offline.gather import RequestOutput
from penstock.serve.offline.llm import LLM

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise UsageError(
        "the package lm-eval is not installed", hint="Install it with: pip install 'penstock[eval]'"
    ) from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

#: Options of a generation that are taken; lm-eval's tasks name them as transformers does.
TAKEN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class PenstockLM(TemplateLM):  # type: ignore[misc]
    """An :class:`~penstock.serve.offline.llm.LLM` as lm-eval wants a model::

        lm_eval.simple_evaluate(PenstockLM(LLM("smollm2")), tasks=["arc_easy"])

    Texts are cut into tokens, and stop, as by lm-eval's own back end for transformers.

    Args:
        llm: the model with its engine.
        progress: how to report; ``core.progress.silent`` is quiet.
    """

    def __init__(self, llm: LLM, progress: Reporter = show) -> None:
        super().__init__()
        self.llm, self.tokenizer, self._progress = llm, llm.tokenizer, progress

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text; the first token where the model has none, since lm-eval wants one."""
        found = self.tokenizer.eos_token_id
        return 0 if found is None else int(found)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        found = self.tokenizer.bos_token_id
        return self.eot_token_id if found is None else int(found)

    @property
    def max_length(self) -> int:
        """Most tokens of a text."""
        return self.llm.engine.limits.context - 1  # a request asks for at least one more

    @property
    def max_gen_toks(self) -> int:
        """Tokens of an answer, where a task does not say."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        """Tells tokenizers apart in lm-eval's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's own."""
        return str(self.tokenizer.chat_template or "") if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text."""
        variables = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        return chat_prompt(self.tokenizer, chat_history, variables=variables).text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokens of a text, with those that the model wants around one unless the text begins with them."""
        bos = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (bos and string.startswith(bos))
        tokens: list[int] = self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]
        return tokens

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For each (text, context, continuation), the log-probability of the continuation, in nats, and whether each of
        its tokens is the most probable one. A context that is too long loses its beginning."""
        prompts, params = [], []
        for texts, context, continuation in requests:
            if not continuation:
                raise UsageError(
                    f"the continuation has no token of its own: it ends in one of its context: {texts!r:.200}"
                )
            tokens = [*context, *continuation][-self.max_length :]
            first = len(tokens) - len(continuation)
            if first < 1:
                raise UsageError(
                    f"a continuation has {len(continuation):,} tokens, and the model reads {self.max_length:,}",
                    hint="Take a model with a longer context, or set context=N if the model itself reads more.",
                )
            prompts.append(tokens)
            params.append(SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, prompt_logprobs_from=first))
        found = []
        for output in self._answered("scoring", prompts, params):
            assert output.prompt_logprobs is not None
            rows = output.prompt_logprobs.rows
            found.append((math.fsum(rows.logprobs), all(row.rank == 1 for row in rows)))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, in windows of the model's context, each token once."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            before = len(windows)
            windows += [(None, *make_disjoint_window(window)) for window in cut]
            counts.append(len(windows) - before)
        scores = iter(self._loglikelihood_tokens(windows))
        return [math.fsum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each context, to the first of its stop strings."""
        prompts, params = [], []
        for request in requests:
            text, options = request.args
            wanted = dict(normalize_gen_kwargs(dict(options), self.max_gen_toks))
            # Without eos: the engine ends a text at the token itself.
            stop = handle_stop_sequences(wanted.pop("until", None), eos=None)
            most = int(wanted.pop("max_gen_toks"))
            prompts.append(self.tok_encode(text)[-(self.llm.engine.limits.context - most) :])
            # Of a greedy answer, lm-eval may leave the temperature out.
            wanted["temperature"] = wanted.get("temperature", 1.0) if wanted.get("do_sample") else 0.0
            taken = {name: wanted[name] for name in TAKEN if wanted.get(name) is not None}
            params.append(SamplingParams(max_tokens=most, stop=tuple(filter(None, stop)), **taken))
        return [output.outputs[0].text for output in self._answered("generating", prompts, params)]

    def _answered(
        self, label: str, prompts: Sequence[list[int]], params: Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        """The engine's outputs, in the order of the prompts."""
        found: dict[int, RequestOutput] = {}
        with StopRequest() as stop, self._progress(label, len(prompts), "request") as bar:
            for place, output in self.llm.as_completed(prompts, params, stop):
                if output.error is not None:
                    raise PenstockError(f"the engine failed on a request: {output.error}")
                found[place] = output
                bar.advance()
        if stop.wanted:
            raise KeyboardInterrupt
        return [found[place] for place in range(len(prompts))]


def harnessed(
    opened: Callable[[], LLM], tasks: Sequence[str], samples: int | None = None, *, chat: bool = False
) -> tuple[str, dict[str, Any]]:
    """Runs lm-eval's ``tasks``: lm-eval's own table of the results, and the results as plain data.

    Args:
        opened: opens the model, once the tasks are known to be there.
        tasks: names, or paths of YAML files.
        samples: of each task, at most; None is all of them.
        chat: put the model's chat template around each question.

    Raises:
        UsageError: a task is not known, or its data cannot be had.
    """
    import json

    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    names = [task for task in tasks if not Path(task).is_file()]
    manager = TaskManager(include_defaults=bool(names))  # reading the thousands that there are takes a while
    missing = sorted(set(names) - set(manager.all_tasks))
    if missing:
        raise UsageError(
            f"lm-eval has no task {missing[0]!r}, and no such file is here",
            hint="List its tasks with: lm-eval ls tasks",
        )
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    model = PenstockLM(opened())
    try:
        found = simple_evaluate(
            model, tasks=list(tasks), limit=samples, task_manager=manager, apply_chat_template=chat, log_samples=False
        )
    except (ConnectionError, FileNotFoundError) as error:
        raise PenstockError(
            f"the data of {', '.join(tasks)} cannot be had: {error}",
            hint="lm-eval takes most of them from the Hugging Face hub; a task in a YAML file can name local files.",
        ) from error
    kept = json.loads(json.dumps(found, default=str))
    return make_table(found), {key: kept[key] for key in ("results", "n-samples", "versions") if key in kept}
