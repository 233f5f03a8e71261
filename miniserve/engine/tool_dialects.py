"""How models write the calls of functions: one table, with what reads a call."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from miniserve.engine.call_reader import CallReader, NoCall, Steps


@dataclass(frozen=True, slots=True)
class Written:
    """How calls are written, for grammars that enforce them: `before` and `after` stand around a call's arguments, NAME
    in them for its name, `between` between two calls (None: there is one call at most), `first` and `last` around
    all."""

    before: str
    after: str
    between: str | None = ""
    first: str = ""
    last: str = ""


@dataclass(frozen=True, slots=True)
class ToolDialect:
    """`begins`: the texts behind one of which a call may be; `read` reads what follows. `bare`: an answer that is a
    JSON object may be a call, too. `marks`: further texts of the dialect. `signs`: what a chat template holds that
    teaches it, and what it does not. `xml`: arguments are tags, not JSON.
    `short_ids`: the templates demand ids of nine letters and digits."""

    name: str
    begins: tuple[str, ...]
    read: Callable[[CallReader, str], Steps[None]]
    written: Written
    signs: tuple[str, ...]
    unlike: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    bare: bool = False
    xml: bool = False
    short_ids: bool = False


# --- readers ----------------------------------------------------------------------------------------------------------


def _read_hermes(reader: CallReader, _: str) -> Steps[None]:
    yield from reader.space()
    yield from reader.json_call()
    yield from reader.after_space("</tool_call>")


def _read_llama(reader: CallReader, _: str) -> Steps[None]:
    """Several calls have `;` between them. Other objects are text, which should not be held back for long."""
    while True:
        yield from reader.space()
        yield from reader.json_call(("type", "id", "arguments", "parameters"))
        reader.attempt()
        yield from reader.space()
        if not (yield from reader.take(";")):
            raise NoCall


def _read_mistral(reader: CallReader, _: str) -> Steps[None]:
    """A list of calls, or a name and its arguments."""
    yield from reader.space()
    if not (yield from reader.take("[")):
        name = yield from reader.name()
        if (yield from reader.take("[CALL_ID]")):
            yield from reader.until(("[ARGS]",), lambda _: None)
        else:
            yield from reader.take("[ARGS]")
        yield from reader.space()
        yield from reader.json_arguments(name)
        return
    while True:
        yield from reader.space()
        yield from reader.json_call()
        reader.attempt()
        if not (yield from reader.after_space(",")):
            yield from reader.space()
            yield from reader.need("]")
            return


_CALLS_BEGIN, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL_BEGIN, _CALL_END, _SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"


def _read_deepseek(reader: CallReader, begin: str) -> Steps[None]:
    """`NAME<sep>{…}`, or `function<sep>NAME` and the arguments in a code block."""
    if begin == _CALLS_BEGIN:
        yield from reader.space()
        yield from reader.need(_CALL_BEGIN)
    name = yield from reader.name()
    yield from reader.need(_SEP)
    yield from reader.space()
    if (yield from reader.char()) == "{":
        yield from reader.json_arguments(name)
    else:
        name = yield from reader.name()
        yield from reader.space()
        yield from reader.need("```json")
        yield from reader.space()
        yield from reader.json_arguments(name)
        yield from reader.after_space("```")
    yield from reader.after_space(_CALL_END)
    yield from reader.after_space(_CALLS_END)


def _read_qwen3_coder(reader: CallReader, _: str) -> Steps[None]:
    yield from reader.space()
    yield from reader.need("<function=")
    name = yield from reader.name()
    yield from reader.need(">")
    reader.begin(name)
    reader.arguments("{")
    schemas = reader.functions[name].get("properties")
    schemas = schemas if isinstance(schemas, Mapping) else {}
    separator = ""
    while (yield from reader.after_space("<parameter=")):
        key: list[str] = []
        yield from reader.until((">",), key.append)
        reader.arguments(f"{separator}{json.dumps(''.join(key), ensure_ascii=False)}: ")
        separator = ", "
        yield from _read_xml_value(reader, types_of(schemas.get("".join(key))))
    yield from reader.need("</function>")
    reader.arguments("}")
    reader.end()
    yield from reader.after_space("</tool_call>")


def _read_xml_value(reader: CallReader, types: frozenset[str]) -> Steps[None]:
    """Strings stand there as they are, everything else as JSON."""
    ends = ("\n</parameter>", "</parameter>")
    yield from reader.take("\n")
    if types == {"string"}:
        reader.arguments('"')
        if not (yield from reader.until(ends, lambda text: reader.arguments(_inner(text)))):
            raise NoCall
        reader.arguments('"')
        return
    pieces: list[str] = []
    if not (yield from reader.until(ends, pieces.append)):
        raise NoCall
    reader.arguments(_as_json("".join(pieces), types))


def _inner(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


_NAMES: Mapping[type, str] = {
    str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object", type(None): "null"
}  # fmt: skip


def _as_json(text: str, types: frozenset[str]) -> str:
    """The JSON that a parameter's text stands for; a string where it is none of the `types` that it may have (none:
    any)."""
    for spelling in (text.strip(), text.strip().lower()):  # Python's True and None
        try:
            value = json.loads(spelling)
        except (ValueError, RecursionError):
            continue
        kind = _NAMES[type(value)]
        if not types or kind in types or (kind == "integer" and "number" in types):
            return spelling
    return json.dumps(text, ensure_ascii=False)


def types_of(schema: object) -> frozenset[str]:
    """Of JSON, that a schema allows; none where it does not say."""
    if not isinstance(schema, Mapping):
        return frozenset()
    if isinstance(kind := schema.get("type"), str):
        return frozenset((kind,))
    if isinstance(kind, list):
        return frozenset(filter(lambda each: isinstance(each, str), kind))
    if isinstance(values := schema.get("enum"), list):
        return frozenset(_NAMES[type(value)] for value in values)
    for name in ("anyOf", "oneOf"):
        if isinstance(branches := schema.get(name), list):
            kinds = [types_of(branch) for branch in branches]
            return frozenset().union(*kinds) if all(kinds) else frozenset()
    return frozenset()


_DIALECTS = (
    ToolDialect(
        "qwen3_coder", ("<tool_call>",), _read_qwen3_coder,
        Written("<tool_call>\n<function=NAME>\n", "</function>\n</tool_call>", between="\n"),
        signs=("<tool_call>", "<function="), marks=("</tool_call>",), xml=True,
    ),
    ToolDialect(
        "hermes", ("<tool_call>",), _read_hermes,
        Written('<tool_call>\n{"name": "NAME", "arguments": ', "}\n</tool_call>", between="\n"),
        signs=("<tool_call>", "arguments"), unlike=("<arg_key>",), marks=("</tool_call>",),
    ),
    ToolDialect(
        "deepseek_v3", (_CALLS_BEGIN, _CALL_BEGIN), _read_deepseek,
        Written(
            f"{_CALL_BEGIN}function{_SEP}NAME\n```json\n", f"\n```{_CALL_END}",
            between="\n", first=_CALLS_BEGIN, last=_CALLS_END,
        ),
        signs=(_CALLS_BEGIN, "```json"), marks=(_CALLS_END, _CALL_END, _SEP),
    ),
    ToolDialect(
        "deepseek_v31", (_CALLS_BEGIN, _CALL_BEGIN), _read_deepseek,
        Written(f"{_CALL_BEGIN}NAME{_SEP}", _CALL_END, first=_CALLS_BEGIN, last=_CALLS_END),
        signs=(_CALLS_BEGIN,), marks=(_CALLS_END, _CALL_END, _SEP),
    ),
    ToolDialect(
        "mistral_v11", ("[TOOL_CALLS]",), _read_mistral, Written("[TOOL_CALLS]NAME[ARGS]", ""),
        signs=("[TOOL_CALLS]", "[ARGS]"), marks=("[ARGS]", "[CALL_ID]"), short_ids=True,
    ),
    ToolDialect(
        "mistral", ("[TOOL_CALLS]",), _read_mistral,
        Written('{"name": "NAME", "arguments": ', "}", between=", ", first="[TOOL_CALLS] [", last="]"),
        signs=("[TOOL_CALLS]",), marks=("[ARGS]", "[CALL_ID]"), short_ids=True,
    ),
    ToolDialect(
        "llama3_json", ("<|python_tag|>",), _read_llama,
        Written('{"name": "NAME", "parameters": ', "}", between=None),
        signs=('"parameters": ', "ipython"), bare=True,
    ),
)  # fmt: skip

TOOL_DIALECTS: Mapping[str, ToolDialect] = {dialect.name: dialect for dialect in _DIALECTS}


def tool_dialect(template: str) -> ToolDialect | None:
    """That which a chat template teaches."""
    for dialect in _DIALECTS:
        if all(sign in template for sign in dialect.signs) and not any(sign in template for sign in dialect.unlike):
            return dialect
    return None
