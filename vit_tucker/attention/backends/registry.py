"""The registry of attention backends, and how one is chosen: by the facts of a call, which are logged."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from vit_tucker.attention.backends.base import Backend, Facts, fast_bfloat16, given_widths
from vit_tucker.errors import ConfigError, PatchError, nearest

AUTO = "auto"
LOGGER = logging.getLogger("vit_tucker.attention")
_BACKENDS: dict[str, Backend] = {}


class Choice(NamedTuple):
    """The backend that computes calls of a kind, and the reason.

    Attributes:
        name: of the backend.
        reason: in words.
    """

    name: str
    reason: str


class Choices(dict[tuple[Facts, str], Choice]):
    """Choices of backends by the facts of a call and the requested name, in the order of first calls."""

    def lines(self) -> list[str]:
        """Returns what ran and why, line by line."""
        return [f"{choice.name}: {choice.reason} [{facts}]" for (facts, _), choice in self.items()]

    def add(self, facts: Facts, wanted: str, choice: Choice) -> Choice:
        """Adds the choice for a new kind of call, and logs it.

        Args:
            facts: of the call.
            wanted: the requested backend, or "auto".
            choice: the backend that computes it.
        """
        self[facts, wanted] = choice
        LOGGER.info("attention backend %s: %s [%s]", choice.name, choice.reason, facts)
        return choice


_RECORDINGS = [Choices()]
"""The innermost recording is the last; the first has what ran outside of all, so that each kind of call is logged once."""
_COMPILED: set[str] = set()
"""Backends in code that torch compiled."""


@contextmanager
def recorded_choices() -> Iterator[Choices]:
    """Records which backends compute the calls inside the context, in all threads, and logs each kind of call once.

    Code that torch compiled before makes no choice when it runs again, so it is dropped: what is called in here is compiled anew.

    Yields:
        What was chosen so far; it stays as it is after the context.
    """
    if _COMPILED:
        torch.compiler.reset()
        _COMPILED.clear()
    choices = Choices()
    _RECORDINGS.append(choices)
    try:
        yield choices
    finally:
        _RECORDINGS[:] = [other for other in _RECORDINGS if other is not choices]
        for outer in _RECORDINGS[1:]:
            outer |= {**choices, **outer}


def register_backend(backend: Backend) -> Backend:
    """Makes a backend available by its name, in Python and in the YAML's ``attention.backend``.

    Raises:
        ConfigError: the name is taken.
    """
    if backend.name == AUTO or backend.name in _BACKENDS:
        raise ConfigError(f"attention backend '{backend.name}' is already registered")
    _BACKENDS[backend.name] = backend
    return backend


def list_backends() -> list[str]:
    """Names of all backends, sorted."""
    return sorted(_BACKENDS)


def get_backend(name: str) -> Backend:
    """Returns a backend by its name.

    Raises:
        ConfigError: no such backend.
    """
    if name not in _BACKENDS:
        known = [AUTO, *list_backends()]
        raise ConfigError(f"unknown attention backend '{name}', known: {', '.join(known)}{nearest(name, known)}")
    return _BACKENDS[name]


def is_whole(name: str) -> bool:
    """Returns whether a backend computes Tucker Attention only, and accepts no queries, keys and values."""
    return name != AUTO and get_backend(name).attend is None


def choose(facts: Facts, wanted: str = AUTO) -> Choice:
    """Chooses the backend for calls with these facts; a backend requested by name computes them or the call fails.

    Raises:
        ConfigError: no backend has this name.
        PatchError: the backend asked for does not support such calls; says why, and which do.
    """
    if torch.compiler.is_compiling():
        return Choice(_choose_while_compiling(wanted, *facts), "")
    if facts.device == "meta":  # nothing is computed
        return decide(facts, wanted)
    known = _RECORDINGS[-1]
    choice = known.get((facts, wanted))
    return known.add(facts, wanted, decide(facts, wanted)) if choice is None else choice


def _choose_while_compiling(wanted: str, *facts: Any) -> str:
    """Runs ``choose`` once, as torch.compile traces the call, with plain values and a name as result."""
    given = Facts(*facts)
    choice = decide(given, wanted)
    _COMPILED.add(choice.name)
    _RECORDINGS[-1].add(given, f"{wanted}, compiled", Choice(choice.name, f"{choice.reason}, compiled"))
    return choice.name


_choose_while_compiling._dynamo_marked_constant = True  # type: ignore[attr-defined]
"""What ``torch.compiler.assume_constant_result`` sets, without its import of ``torch._dynamo``, which takes a second."""


def decide(facts: Facts, wanted: str) -> Choice:
    """Decides as ``choose`` does, without memory or log.

    Raises:
        PatchError: the requested backend can't compute such calls.
    """
    if wanted != AUTO:
        reason = get_backend(wanted).refuses(facts)
        if reason is None:
            return _chosen(wanted, facts, ["asked for"])
        able = [name for name in list_backends() if _BACKENDS[name].refuses(facts) is None]
        raise PatchError(
            f"attention backend '{wanted}' does not support this call: {reason} [{facts}]; these can: {', '.join([AUTO, *able])}"
        )
    refusals: list[str] = []
    for name, reason in preferences(facts):
        refusal = get_backend(name).refuses(facts)
        if refusal is None:
            return _chosen(name, facts, [reason, *refusals])
        refusals.append(f"not {name}: {refusal}")
    raise PatchError(f"no attention backend supports this call: {'; '.join(refusals)} [{facts}]")


def _chosen(name: str, facts: Facts, reasons: list[str]) -> Choice:
    """Returns a choice with its reasons and the backend's own remark."""
    remark = get_backend(name).remark
    given = [reason for reason in reasons if reason]
    return Choice(name, "; ".join(given if remark is None else [*given, remark(facts)]))


def preferences(facts: Facts) -> list[tuple[str, str]]:
    """Returns the backends in the order in which "auto" tries them, each with its reason, which may be empty.

    The measured ground of it is in benchmarks/README.md. What was never measured is not chosen: so far no GPU kernel was.
    """
    if facts.own_only:
        return [("sdpa", "exported or transformed, so torch's own operation")]
    if facts.few and facts.device == "cpu":
        return few_on_cpu(facts)
    if facts.device == "cpu" and facts.dtype == torch.bfloat16 and fast_bfloat16():
        reason = "this CPU multiplies bfloat16 faster than torch's attention kernel does"
        return [("blocked", reason), ("eager", reason)]
    if facts.device == "cpu" and facts.keeps_more and facts.grad:
        return [
            ("latent", "keeping all queries would need more memory than dense attention"),
            ("sdpa", ""),
        ]
    return [("sdpa", "")]


def few_on_cpu(facts: Facts) -> list[tuple[str, str]]:
    """Returns what ``preferences`` does for few queries with a past: what copies neither keys nor values."""
    if get_backend("sdpa").widths(facts) != given_widths(facts):
        return [("eager", "torch's kernel would need the past padded, a copy for each token")]
    return [("sdpa", "the past is read once, for stacked heads" if facts.kv_heads < facts.heads else "")]
