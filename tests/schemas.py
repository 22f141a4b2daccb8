"""Runs JSON schemas of a suite through the server's own way from a schema to a grammar, and compares with the suite's instances.

    python tests/schemas.py DIR [--draws 3] [--sample 500] [--list]       `make schemas SUITE=DIR`

DIR holds .json files: cases of JSON-Schema-Test-Suite (a list of {"schema", "tests": [{"data", "valid"}]}), files of
JSONSchemaBench's maskbench (one such object each), or bare schemas. A schema is refused, with a reason, or accepted. Then

- no invalid instance may be in the grammar's language, however it is written: compact, with blanks, escaped, its names in the
  schema's order;
- what random draws from the grammar end with must validate (jsonschema, with its checks of formats).

Exit code 1 if either fails, or anything but a refusal is raised. Invalid instances that jsonschema calls valid are "disputed".
"""

import argparse
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import referencing.exceptions
from llguidance import LLMatcher

from tpserve.errors import UserError
from tpserve.frontend.openai.body import parse
from tpserve.frontend.openai.grammar import grammar_of
from tpserve.frontend.openai.schema import CompletionRequest
from tpserve.structured_output.compiler import GrammarError, compile_grammar, vocabulary
from tpserve.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(Path(__file__).resolve().parents[1] / "tpserve" / "builtin" / "model")
VOCABULARY = vocabulary(TOKENIZER, TOKENIZER.vocab_size, ())
DRAW_TOKENS = 400


@dataclass
class Case:
    """A schema with its instances."""

    name: str
    schema: Any
    instances: list[tuple[Any, bool]] = field(default_factory=list)


@dataclass
class Verdict:
    """What became of a case."""

    name: str
    refusal: str = ""
    """Why it is refused; empty: accepted."""
    crash: str = ""
    valid: int = 0
    valid_taken: int = 0
    invalid: int = 0
    wrong: list[str] = field(default_factory=list)
    """Invalid instances that the grammar takes, and draws that do not validate."""
    disputed: list[str] = field(default_factory=list)
    """Instances that the grammar takes and that only the suite calls invalid."""
    draws: int = 0
    compile_s: float = 0.0


def cases(root: Path) -> Iterator[Case]:
    """All of a directory, in order."""
    for path in sorted(root.rglob("*.json")):
        try:
            content = json.loads(path.read_bytes())
        except ValueError:
            continue
        name = str(path.relative_to(root)) if path != root else path.name
        groups = content if isinstance(content, list) else [content]
        for group in groups:
            if not isinstance(group, dict):
                continue
            if "schema" not in group or "tests" not in group:
                yield Case(name, group)
                continue
            label = f"{name}: {group.get('description', '')}" if len(groups) > 1 else name
            yield Case(label, group["schema"], [(test["data"], test["valid"]) for test in group["tests"]])


def compiled(schema: Any) -> LLMatcher:
    """The schema as `structured_outputs` of a request. UserError or GrammarError is a refusal."""
    call, _ = parse({"prompt": "", "structured_outputs": {"json": schema}}, CompletionRequest, set())
    return compile_grammar(VOCABULARY, grammar_of(call))


def takes(matcher: LLMatcher, text: str) -> bool:
    """Whether the whole text is in the language."""
    walker = matcher.deep_copy()
    return walker.consume_tokens(TOKENIZER.encode(text, add_special_tokens=False)) and walker.is_accepting()


def spellings(value: Any, names: dict[str, int]) -> Iterator[str]:
    """The ways to write a value that a grammar may know."""
    for each in (value, ordered(value, names)):
        for ascii_only in (False, True):
            yield json.dumps(each, ensure_ascii=ascii_only, separators=(",", ":"))
            yield json.dumps(each, ensure_ascii=ascii_only)
        yield json.dumps(each, indent=2)


def ordered(value: Any, names: dict[str, int]) -> Any:
    """The value with the members of its objects in the order in which a schema names them."""
    if isinstance(value, list):
        return [ordered(part, names) for part in value]
    if isinstance(value, dict):
        return {name: ordered(value[name], names) for name in sorted(value, key=lambda name: names.get(name, len(names)))}
    return value


def names_of(schema: Any) -> dict[str, int]:
    """The names of a schema's properties, by their first place."""
    found: dict[str, int] = {}

    def walk(part: Any) -> None:
        if isinstance(part, dict):
            for key, inner in part.items():
                if key == "properties" and isinstance(inner, dict):
                    for name in inner:
                        found.setdefault(name, len(found))
                if key == "required" and isinstance(inner, list):
                    for name in inner:
                        found.setdefault(str(name), len(found))
                walk(inner)
        elif isinstance(part, list):
            for inner in part:
                walk(inner)

    walk(schema)
    return found


def draw(matcher: LLMatcher, dice: random.Random) -> str | None:
    """A random text of the language, or None: it did not end. Short tokens that close something are drawn more often."""
    walker, tokens = matcher.deep_copy(), []
    for _ in range(DRAW_TOKENS):
        if walker.is_accepting() and (walker.is_stopped() or dice.random() < 0.2):
            return TOKENIZER.decode(tokens)
        mask = walker.compute_bitmask()
        allowed = [id for id in range(TOKENIZER.vocab_size) if mask[id >> 3] >> (id & 7) & 1]
        if not allowed:
            return TOKENIZER.decode(tokens) if walker.is_accepting() else None
        closing = [id for id in allowed if set(TOKENIZER.token_text(id)) & set('"}]')]
        tokens.append(dice.choice(closing if closing and dice.random() < 0.25 else allowed))
        if not walker.consume_token(tokens[-1]):
            return None
    return None


def validator_of(schema: Any) -> Any:
    """jsonschema's validator, or None where it has none: a remote reference, a schema that is none itself."""
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except Exception:
        return None
    return kind(schema, format_checker=kind.FORMAT_CHECKER)


def error_of(validator: Any, value: Any) -> str | None:
    """What jsonschema says about a value, in short; None: it is valid, or jsonschema cannot tell."""
    try:
        error = next((each for each in validator.iter_errors(value) if not _is_multiple(each)), None)
    except (referencing.exceptions.Unresolvable, RecursionError, re.error, ValueError, OverflowError):
        return None
    return None if error is None else f"{error.validator}: {error.message[:150]}"


def _is_multiple(error: jsonschema.ValidationError) -> bool:
    """Whether a complaint about multipleOf comes from jsonschema's division of doubles: 0.6395 is a multiple of 0.0001."""
    if error.validator != "multipleOf":
        return False
    return Decimal(repr(error.instance)) % Decimal(repr(error.validator_value)) == 0


def judge(case: Case, draws: int) -> Verdict:
    """One case."""
    verdict, begin = Verdict(case.name), time.perf_counter()
    try:
        matcher = compiled(case.schema)
    except (UserError, GrammarError) as error:
        verdict.refusal = str(error) or "no reason"
        return verdict
    except Exception as error:
        verdict.crash = f"{type(error).__name__}: {error}"
        return verdict
    finally:
        verdict.compile_s = time.perf_counter() - begin
    names, validator = names_of(case.schema), validator_of(case.schema)
    for value, valid in case.instances:
        taken = next((text for text in spellings(value, names) if takes(matcher, text)), None)
        verdict.valid += valid
        verdict.invalid += not valid
        verdict.valid_taken += valid and taken is not None
        if not valid and taken is not None:
            sure = validator is None or error_of(validator, value) is not None
            (verdict.wrong if sure else verdict.disputed).append(taken[:300])
    if validator is not None:
        verdict.wrong += wrong_draws(matcher, validator, verdict, draws)
    return verdict


def wrong_draws(matcher: LLMatcher, validator: Any, verdict: Verdict, draws: int) -> list[str]:
    """Random texts of the language that are not valid."""
    dice, wrong = random.Random(verdict.name), []
    for _ in range(draws):
        text = draw(matcher, dice)
        if text is None:
            continue
        verdict.draws += 1
        try:
            error = error_of(validator, json.loads(text))
        except ValueError as bad:
            error = f"no JSON: {bad}"
        if error:
            wrong.append(f"drawn: {text[:300]} -- {error}")
    return wrong


def kind_of(refusal: str) -> str:
    """A refusal without what only this schema has."""
    refusal = re.sub(r"^structured_outputs.json: (at #\S*: )?", "", refusal)
    return re.sub(r'"[^"]*"|\'[^\']*\'|[-+]?\d[\d.e+]*', "..", refusal.split("\n", 1)[0])[:110]


def report(verdicts: list[Verdict], took_s: float, listed: bool) -> int:
    """Print what came of it; the exit code."""
    accepted = [v for v in verdicts if not v.refusal and not v.crash]
    refused = [v for v in verdicts if v.refusal]
    crashed = [v for v in verdicts if v.crash]
    if listed:
        for v in refused:
            print(f"refused  {v.name}: {v.refusal[:200]}")
    for v in crashed:
        print(f"CRASH    {v.name}: {v.crash[:300]}")
    for v in accepted:
        for text in v.wrong:
            print(f"WRONG    {v.name}: {text}")
        for text in v.disputed:
            print(f"disputed {v.name}: {text}")
    wrong = sum(bool(v.wrong) for v in accepted)
    valid, valid_taken, invalid, draws = (
        sum(getattr(v, name) for v in accepted) for name in ("valid", "valid_taken", "invalid", "draws")
    )
    print(f"\n{len(verdicts)} schemas in {took_s:.0f} s, llguidance {version('llguidance')}, jsonschema {version('jsonschema')}")
    print(f"accepted {len(accepted)}, refused {len(refused)}, crashed {len(crashed)}")
    print(f"of accepted schemas: valid instances {valid}, taken {valid_taken}; invalid instances {invalid}; draws {draws}")
    print(f"wrong: {wrong} schemas; disputed: {sum(len(v.disputed) for v in accepted)} instances")
    times = sorted(v.compile_s * 1e3 for v in verdicts) or [0.0]
    print(f"compiling, ms: p50 {times[len(times) // 2]:.2f}, p99 {times[len(times) * 99 // 100]:.1f}, max {times[-1]:.0f}")
    print("\nrefusals by reason:")
    for reason, count in Counter(kind_of(v.refusal) for v in refused).most_common(60):
        print(f"{count:6}  {reason}")
    return int(bool(wrong or crashed))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--draws", type=int, default=3, help="random texts drawn of each accepted grammar")
    parser.add_argument("--sample", type=int, default=0, help="so many cases, chosen by a fixed seed; default: all")
    parser.add_argument("--list", action="store_true", help="print each refusal")
    options = parser.parse_args()
    found = list(cases(options.directory))
    if options.sample:
        found = random.Random(0).sample(found, min(options.sample, len(found)))
    begin = time.perf_counter()
    with ProcessPoolExecutor(2) as pool:
        verdicts = list(pool.map(judge, found, [options.draws] * len(found), chunksize=16))
    return report(verdicts, time.perf_counter() - begin, options.list)


if __name__ == "__main__":
    sys.exit(main())
