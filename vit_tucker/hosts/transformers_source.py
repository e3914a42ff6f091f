"""Recognises LLaMA's attention in transformers by its source: what is equal, statement by statement, computes the same.

transformers writes most families' attention out of one template, so that some forty classes have LLaMA's ``forward`` but for
norms, a sliding window or a dropout. Names say little about it; the statements decide, of the version that is installed.
"""

import ast
import importlib
import inspect
import sys
from dataclasses import dataclass
from functools import cache

from vit_tucker.errors import PatchError

GPT2 = "transformers.models.gpt2.modeling_gpt2"
LLAMA = "transformers.models.llama.modeling_llama"
ROTARY_FUNCTIONS = ("apply_rotary_pos_emb", "rotate_half")
ROTATE = (
    "cos, sin = position_embeddings",
    "query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)",
)
"""How LLaMA rotates queries and keys."""
ROTATE_IF = f"if self.use_rope:\n    {ROTATE[0]}\n    {ROTATE[1]}"
"""The same in models some of whose layers don't rotate (SmolLM3)."""
NORMS = ("query_states = self.q_norm(query_states)", "key_states = self.k_norm(key_states)")
PROJECT = tuple(
    f"{name}_states = self.{name[0]}_proj(hidden_states).view(hidden_shape).transpose(1, 2)"
    for name in ("query", "key")
)
PROJECT_NORMED = tuple(
    f"{name}_states = self.{name[0]}_norm(self.{name[0]}_proj(hidden_states).view(hidden_shape)).transpose(1, 2)"
    for name in ("query", "key")
)
"""Heads' queries and keys, normalised as they are projected (Qwen3)."""
OUTPUT_DROPOUT = "attn_output = nn.functional.dropout(attn_output, p=self.residual_dropout, training=self.training)"
CALL = "attn_output, attn_weights = attention_interface("
CALL_ARGUMENTS = ("self", "query_states", "key_states", "value_states", "attention_mask")
CALL_KEYWORDS = {
    "dropout": (
        "0.0 if not self.training else self.attention_dropout",
        "self.attention_dropout if self.training else 0.0",
    ),
    "scaling": ("self.scaling",),
    "sliding_window": ("self.sliding_window", "getattr(self.config, 'sliding_window', None)"),
}
"""Keywords of the attention function, and the values that are understood; any other is refused."""
REASONS = {
    "softcap": "its scores are capped (softcap), which no fused attention of ours computes",
    "s_aux": "its softmax has a sink for each head, which no method of ours carries",
}
"""What other keywords of the attention function do."""


@dataclass(frozen=True)
class LlamaForm:
    """Describes what an attention class with LLaMA's forward has beside it.

    Attributes:
        rotates: queries and keys are rotated (RoPE): "always", "never", or "use_rope": where the module's attribute says so.
        norms: heads' queries and keys are normalised before they rotate, by ``q_norm`` and ``k_norm``.
        window: value of the attention function's ``sliding_window``, as source; None without one.
        output_dropout: the output passes a dropout of rate ``residual_dropout``.
    """

    rotates: str
    norms: bool
    window: str | None
    output_dropout: bool


@cache
def module_tree(module: str) -> ast.Module:
    """Returns the syntax tree of a module that can be imported."""
    return ast.parse(inspect.getsource(sys.modules.get(module) or importlib.import_module(module)))


def definition(module: str, name: str, inside: str | None = None) -> ast.FunctionDef | None:
    """Returns a function as a module's file defines it; None if it does not.

    Args:
        module: name of the module.
        name: of the function.
        inside: class whose method it is; None for a function of the module.
    """
    body: list[ast.stmt] = module_tree(module).body
    if inside is not None:
        classes = (node for node in body if isinstance(node, ast.ClassDef) and node.name == inside)
        body = next((node.body for node in classes), [])
    return next((node for node in body if isinstance(node, ast.FunctionDef) and node.name == name), None)


def statements(function: ast.FunctionDef) -> list[str]:
    """Returns the statements of a function in normal form: without docstring and annotations, the cache under one name."""
    found = []
    for node in function.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            node = ast.copy_location(ast.Assign([node.target], node.value), node)
        found.append(ast.unparse(ast.fix_missing_locations(node)).replace("past_key_values", "cache"))
    return found


def call_keywords(statement: str) -> dict[str, str]:
    """Returns the keywords of the attention function's call, with their values as source.

    Raises:
        PatchError: other arguments than LLaMA's.
    """
    call = ast.parse(statement).body[0].value  # type: ignore[attr-defined]
    if tuple(map(ast.unparse, call.args)) != CALL_ARGUMENTS:
        raise PatchError(f"its attention function is called as `{statement}`")
    keywords = {word.arg: ast.unparse(word.value) for word in call.keywords if word.arg is not None}
    for name, value in keywords.items():
        if value not in CALL_KEYWORDS.get(name, ()):
            raise PatchError(REASONS.get(name, f"its attention function gets {name}={value}"))
    return keywords


@cache
def llama_form(module: str, name: str) -> LlamaForm:
    """Compares an attention class with LLaMA's.

    Args:
        module: of the class, such as 'transformers.models.qwen2.modeling_qwen2'.
        name: of the class.

    Raises:
        PatchError: it computes something else, or may; names the first difference. The message lacks the module's name.
    """
    forward, llama = definition(module, "forward", name), definition(LLAMA, "forward", "LlamaAttention")
    assert llama is not None
    if forward is None:
        raise PatchError("its file defines no forward to compare with LLaMA's")
    given, expected = statements(forward), statements(llama)
    call = next((line for line in given if line.startswith(CALL)), None)
    if call is None:
        raise PatchError(f"its forward is not LLaMA's: `{first_difference(given, expected)}`")
    keywords = call_keywords(call)
    norms = all(line in given for line in NORMS) or all(line in given for line in PROJECT_NORMED)
    rotates = "always" if ROTATE[1] in given else "use_rope" if ROTATE_IF in given else "never"
    form = LlamaForm(rotates, norms, keywords.get("sliding_window"), OUTPUT_DROPOUT in given)
    if plain_statements(given) != plain_statements(expected):
        raise PatchError(f"its forward is not LLaMA's: `{first_difference(given, expected)}`")
    if rotates != "never":
        refuse_other_rotation(module, given)
    return form


def plain_statements(lines: list[str]) -> list[str]:
    """Returns a forward without what a ``LlamaForm`` describes: norms, rotation, dropout of the output, keywords of the call."""
    left_out = {*NORMS, *ROTATE, ROTATE_IF, OUTPUT_DROPOUT}
    renamed = dict(zip(PROJECT_NORMED, PROJECT, strict=True))
    return [CALL if line.startswith(CALL) else renamed.get(line, line) for line in lines if line not in left_out]


def first_difference(given: list[str], expected: list[str]) -> str:
    """Returns the first statement that LLaMA's forward does not have, else the first of LLaMA's that is missing, on one line."""
    known = {*expected, *NORMS, *PROJECT_NORMED, *ROTATE, ROTATE_IF, OUTPUT_DROPOUT}
    other = [line for line in given if line not in known and not line.startswith(CALL)]
    missing = [f"no {line}" for line in expected if line not in given and line not in known]
    shown = " ".join((other or missing or ["the order of its statements"])[0].split())
    return shown if len(shown) <= 120 else f"{shown[:117]}..."


def refuse_other_rotation(module: str, given: list[str]) -> None:
    """Raises PatchError unless a module rotates in halves, as LLaMA does, after the norms.

    Args:
        module: of the class.
        given: its forward's statements.
    """
    place = given.index(ROTATE[1] if ROTATE[1] in given else ROTATE_IF)
    if any(line in given[place:] for line in NORMS):
        raise PatchError("its queries and keys are normalised after their rotation")
    for name in ROTARY_FUNCTIONS:
        own, llama = definition(module, name), definition(LLAMA, name)
        assert llama is not None
        if own is not None and statements(own) != statements(llama):
            raise PatchError(f"its rotation (RoPE) is not LLaMA's: {name} differs, as in interleaved or partial ones")
        if own is None and inspect.getmodule(getattr(sys.modules[module], name, None)) is not sys.modules[LLAMA]:
            raise PatchError(f"its rotation (RoPE) is not LLaMA's: its file defines no {name}")
