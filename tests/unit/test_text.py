"""Tokenizer, text streams and chat templates."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2.exceptions import SecurityError
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template

from tests.http.tiny_tokenizer import byte_level, metaspace, save
from tpserve.errors import UserError
from tpserve.text.chat import ChatTemplate
from tpserve.text.fill_in import fill_in_ids
from tpserve.text.tokenizer import Tokenizer

BYTES = Tokenizer(byte_level(), {})
SPACES = Tokenizer(metaspace(), {})
HELLO = [{"role": "user", "content": "hi"}]


def streamed(tokenizer: Tokenizer, ids: list[int], prompt: Sequence[int] = ()) -> str:
    stream = tokenizer.stream(prompt)
    return "".join([stream.step(token) for token in ids]) + stream.flush()


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40))
@example("naïve 🎉🎉 the cat — 漢字")
def test_stream_of_text_is_the_text(text: str) -> None:
    for tokenizer in (BYTES, SPACES):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)
    assert streamed(BYTES, BYTES.encode(text)) == text


def test_stream_keeps_the_space_between_prompt_and_output() -> None:
    vocabulary = metaspace().get_vocab()
    the, cat = vocabulary["▁the"], vocabulary["▁cat"]
    assert SPACES.decode([cat]) == "cat"
    assert streamed(SPACES, [cat], [the]) == " cat"


def test_stream_completes_a_character_of_the_prompt() -> None:
    first, second = (4 + byte for byte in "é".encode())
    assert streamed(SPACES, [second], [first]) == "é"


def test_no_piece_ends_inside_a_character() -> None:
    stream = BYTES.stream()
    pieces = [stream.step(token) for token in BYTES.encode("漢🎉")]
    assert not any("\ufffd" in piece for piece in pieces) and pieces.count("") == len(pieces) - 2


def test_token_bytes_are_exact() -> None:
    for tokenizer, text in ((BYTES, "the 漢🎉"), (SPACES, " 漢")):
        ids = tokenizer.encode(text, False)
        assert b"".join(tokenizer.token_bytes(token) for token in ids).decode().strip() == text.strip()
    assert BYTES.token_bytes(99999) == b"" and BYTES.token_text(99999) == ""


def test_load_names_what_is_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no tokenizer: neither tokenizer\.json, nor tokenizer\.model, nor vocab\.json with"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "mod')
    with pytest.raises(UserError, match=r"tokenizer\.json is no tokenizer"):
        Tokenizer.load(tmp_path)
    save(byte_level(), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"tokenizer_config\.json holds no JSON object"):
        Tokenizer.load(tmp_path)


def test_load_takes_tokens_from_the_config(tmp_path: Path) -> None:
    save(byte_level(), tmp_path)
    path = tmp_path / "tokenizer_config.json"
    extra = Tokenizer.load(tmp_path).vocab_size
    config = json.loads(path.read_text()) | {"added_tokens_decoder": {str(extra): {"content": "<|eot|>", "special": True}}}
    path.write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("the<|eot|>")[-1] == extra and tokenizer.vocab_size == extra + 1
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    path.write_text(json.dumps(config | {"added_tokens_decoder": {"9999": {"content": "<|far|>", "special": True}}}))
    with pytest.raises(UserError, match="wants id 9999"):
        Tokenizer.load(tmp_path)


def test_chat_template_of_a_directory(tmp_path: Path) -> None:
    save(byte_level(), tmp_path)
    template = ChatTemplate.load(tmp_path, Tokenizer.load(tmp_path).special_tokens)
    assert template.render(HELLO) == "<s><|user|>hi</s><|assistant|>"
    turns = [*HELLO, {"role": "assistant", "content": "he"}]
    assert template.render(turns, add_generation_prompt=False) == "<s><|user|>hi</s><|assistant|>he</s>"
    assert template.render(turns, add_generation_prompt=False, continue_final_message=True) == "<s><|user|>hi</s><|assistant|>he"
    (tmp_path / "chat_template.jinja").write_text("newer {{ messages[0].content }}")
    assert ChatTemplate.load(tmp_path, {}).render(HELLO) == "newer hi"


NAMED = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.json"])
def test_named_chat_templates(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(json.dumps({"chat_template": NAMED}))
    assert ChatTemplate.load(tmp_path, {}).render(HELLO) == "plain"
    assert ChatTemplate.load(tmp_path, {}, "tool_use").render(HELLO) == "tools"
    assert ChatTemplate.load(tmp_path, {}, "{{ 1 }}").render(HELLO) == "1"
    (tmp_path / name).write_text(json.dumps({"chat_template": {"default": "plain", "rag": "documents"}}))
    assert ChatTemplate.load(tmp_path, {}, "rag").render(HELLO) == "documents"
    (tmp_path / name).write_text(json.dumps({"chat_template": NAMED}))
    with pytest.raises(
        UserError, match="--chat-template rag is neither a file, nor .* one of the model's templates tool_use, default"
    ):
        ChatTemplate.load(tmp_path, {}, "rag")


def test_which_chat_template_wins_is_as_in_transformers(tmp_path: Path) -> None:
    """The newest convention, and whole: a directory with files of templates has no others."""
    save(byte_level(), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": NAMED}))

    def both(name: str | None = None) -> list[str | None]:
        found: list[str | None] = []
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        for render in (lambda: theirs.apply_chat_template(HELLO, chat_template=name, tokenize=False),
                       lambda: ChatTemplate.load(tmp_path, {}, name).render(HELLO)):  # fmt: skip
            try:
                found.append(render())
            except (ValueError, UserError):
                found.append(None)
        return found

    assert both() == ["plain", "plain"] and both("tool_use") == ["tools", "tools"]
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("documents")
    assert both() == [None, None] and both("rag") == ["documents", "documents"]
    with pytest.raises(
        UserError, match=r"several chat templates \(rag\) and none is called default; start the server with --chat-t"
    ):
        ChatTemplate.load(tmp_path, {}).render(HELLO)
    (tmp_path / "chat_template.jinja").write_text("newest")
    assert both() == ["newest", "newest"] and both("rag") == ["documents", "documents"]
    with pytest.raises(UserError, match="one of the model's templates default, rag"):
        ChatTemplate.load(tmp_path, {}, "tool_use")


PARTS = [{"type": "text", "text": "\tA "}, {"type": "text", "text": "B"}]
LOOP = "{% for part in m.content %}{% if part.type == 'text' %}[{{ part.text }}]{% endif %}{% endfor %}"
EITHER = "{% if m.content is string %}{{ m.content }}{% else %}" + LOOP + "{% endif %}"


@pytest.mark.parametrize(
    "shown",
    [
        LOOP,
        EITHER,
        "{{ m['content'] | map(attribute='text') | join('+') }}",
        "{% macro show(content) %}{% for x in content %}{{ x['text'] | trim }};{% endfor %}{% endmacro %}{{ show(m.content) }}",
    ],
)
def test_a_template_that_shows_parts_gets_them_as_in_transformers(tmp_path: Path, shown: str) -> None:
    source = "{% for m in messages %}<{{ m.role }}>" + shown + "{% endfor %}"
    byte_level().save(str(tmp_path / "tokenizer.json"))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for messages in (
        [{"role": "user", "content": PARTS}],
        [{"role": "system", "content": PARTS[:1]}, {"role": "user", "content": PARTS}, {"role": "assistant", "content": PARTS}],
    ):
        expected = theirs.apply_chat_template(messages, chat_template=source, tokenize=False)
        assert ChatTemplate(source).render(messages) == expected
        cut = ChatTemplate(source).render(messages, add_generation_prompt=False, continue_final_message=True)
        assert expected.startswith(cut) and cut.endswith("B")


@pytest.mark.parametrize(
    "shown",
    [
        "{{ m.content }}",
        "{{ m['content'] | trim }}",
        "{{ '' + m['content'] }}",
        "{{ m.content.strip() }}",
        "{{ m.content | tojson }}",
        "{{ m.content | tojson(separators=(',', ':')) }}",
        "{% if m.content is string %}{{ m.content }}{% endif %}",
        "{{ m.content[:9] }}",
        "{% if m.content is not string %}{{ raise_exception('only texts') }}{% endif %}{{ m.content }}",
    ],
)
def test_a_template_that_knows_only_texts_gets_one(shown: str) -> None:
    template = ChatTemplate("{% for m in messages %}<{{ m.role }}>" + shown + "{% endfor %}")
    whole = [{"role": "user", "content": "\tA B"}, {"role": "assistant", "content": "C"}]
    prompt = template.render([{"role": "user", "content": PARTS}, whole[1]])
    assert prompt == template.render(whole) and "A B" in prompt


@pytest.mark.parametrize("templates", [[{"name": "default"}], [3], {"default": 1}, 7, [{"name": "a", "template": None}]])
def test_chat_templates_that_are_none_are_named(tmp_path: Path, templates: object) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    with pytest.raises(UserError, match=r"tokenizer_config\.json: chat_template is neither a template nor a list of named ones"):
        ChatTemplate.load(tmp_path, {})


def test_chat_template_names_of_the_hub() -> None:
    source = "{{ strftime_now('%Y') | length }} {{ x | tojson }}{% for i in [1, 2] %}{{ i }}{% break %}{% endfor %}"
    assert ChatTemplate(source).render(HELLO, variables={"x": "<é>"}) == '4 "<é>"1'
    assert (
        ChatTemplate("{{ tools is none }}{{ messages[::-1][0].content }}{{ messages[0].name is defined }}").render(HELLO)
        == "TruehiFalse"
    )


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}{{ messages[7].x.y }}", "refused the messages"),
        ("{{ messages + 1 }}", "refused the messages"),
        ("{{ messages.__class__.__mro__ }}", "refused the messages"),
        ("{{ messages.append(1) }}", "refused the messages.*--chat-template"),
        ("{% set n = namespace(ids=[]) %}{% set _ = n.ids.append(1) %}", "refused the messages.*--chat-template"),
        ("{% set n = namespace(_a=1) %}", "refused the messages"),
        ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "refused the messages"),
        ("{% for i in range(10 ** 8) %}x{% endfor %}", "refused the messages"),
    ],
)
def test_chat_template_errors_are_the_users(source: str | None, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as info:
        ChatTemplate(source).render(HELLO)
    assert info.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{% set n = namespace(ids=[]) %}{% set _ = n.ids.append(1) %}{{ n.ids }}",
        "{% set n = namespace(_a=1) %}{{ n._a }}",
        "{% set n = namespace(self=1) %}{% set n.b = [2] + [3] %}{{ n.self }}{{ n.b }}",
        "{% set x = {'a': 1} %}{{ x.update(b=2) }}",
    ],
)
def test_what_a_template_may_do_is_as_in_transformers(source: str) -> None:
    try:
        expected: str | None = _compile_jinja_template(source).render(messages=HELLO)
    except SecurityError:
        expected = None
    try:
        assert ChatTemplate(source).render(HELLO) == expected
    except UserError:
        assert expected is None


def test_broken_chat_template_is_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(UserError, match=r"chat_template\.jinja is no valid Jinja template"):
        ChatTemplate.load(tmp_path, {})


def test_documents_reach_the_template() -> None:
    template = ChatTemplate("{% for d in documents or [] %}[{{ d.text }}]{% endfor %}{{ messages[0].content }}")
    messages = [{"role": "user", "content": "hi"}]
    assert template.render(messages, documents=[{"text": "a"}, {"text": "b"}]) == "[a][b]hi"
    assert template.render(messages) == "hi"


def test_a_suffix_is_filled_in_with_the_models_own_tokens() -> None:
    rust = byte_level()
    rust.add_special_tokens(["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"])
    tokenizer = Tokenizer(rust, {})
    ids = fill_in_ids(tokenizer, "def f(", "    return 1", add_special_tokens=True)
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|fim_prefix|>def f(<|fim_suffix|>    return 1<|fim_middle|>"
    with pytest.raises(UserError, match="suffix: this model's tokenizer has no tokens for filling in"):
        fill_in_ids(BYTES, "a", "b", add_special_tokens=True)
