"""Small chat templates in the styles of the field: how each writes turns, reasoning and calls."""

LOOP = "{%- for message in messages -%}"
END = "{%- endfor -%}"
CALLS = "{%- for call in message.tool_calls -%}{%- set f = call.function -%}"
TOOLS = "{%- if tools -%}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{%- endif -%}\n"


def chatml(answer: str, prompt: str = "") -> str:
    """A template of the ChatML style. `answer`: what an assistant's turn holds; `prompt`: what the generation prompt adds."""
    return (
        f"{TOOLS}{LOOP}{{{{- '<|im_start|>' ~ message.role ~ '\\n' -}}}}"
        f"{{%- if message.role == 'assistant' -%}}{answer}{{%- else -%}}{{{{ message.content }}}}{{%- endif -%}}"
        f"{{{{- '<|im_end|>\\n' -}}}}{END}"
        f"{{%- if add_generation_prompt -%}}{{{{- '<|im_start|>assistant\\n' -}}}}{prompt}{{%- endif -%}}"
    )


HERMES_CALLS = (
    "{%- for call in message.tool_calls -%}{{- '\\n' if loop.index0 or message.content else '' -}}"
    '{{- \'<tool_call>\\n{"name": "\' ~ call.function.name ~ \'", "arguments": \' ~ call.function.arguments | tojson '
    "~ '}\\n</tool_call>' -}}{%- endfor -%}"
)
HERMES = chatml("{{ message.content }}" + HERMES_CALLS)
QWEN3 = chatml(
    "{%- if loop.last -%}{{- '<think>\\n' ~ (message.reasoning_content or '') ~ '\\n</think>\\n\\n' -}}{%- endif -%}"
    "{{ message.content }}" + HERMES_CALLS,
    "{%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}",
)
STRIPS_REASONING = chatml("{{ message.content.split('</think>')[-1] }}" + HERMES_CALLS, "{{- '<think>\\n' -}}")
CLOSES_REASONING = chatml(
    "{{- ('<think>' ~ message.reasoning_content if message.reasoning_content else '') ~ '</think>' -}}{{ message.content }}"
    + HERMES_CALLS,
    "{{- '<think>' if thinking else '</think>' -}}",
)
TAGGED = chatml(
    "{{ message.content }}{%- for call in message.tool_calls -%}{{- '\\n' if loop.index0 or message.content else '' -}}"
    "{{- '<tool_call>\\n<function=' ~ call.function.name ~ '>\\n' -}}"
    "{%- for key, value in call.function.arguments.items() -%}"
    "{{- '<parameter=' ~ key ~ '>\\n' ~ (value if value is string else value | tojson) ~ '\\n</parameter>\\n' -}}"
    "{%- endfor -%}{{- '</function>\\n</tool_call>' -}}{%- endfor -%}"
)
GLM = chatml(
    "{{ '<think>' ~ (message.thinking or '') ~ '</think>' }}{{ message.content }}{%- for call in message.tool_calls -%}"
    "{{- '<tool_call>' ~ call.function.name -}}{%- for key, value in call.function.arguments.items() -%}"
    "{{- '<arg_key>' ~ key ~ '</arg_key><arg_value>' ~ (value if value is string else value | tojson) ~ '</arg_value>' -}}"
    "{%- endfor -%}{{- '</tool_call>' -}}{%- endfor -%}",
    "{{- '<think>' if thinking else '</think>' -}}",
)
DSML = chatml(
    "{{ message.content }}{%- if message.tool_calls -%}{{- '\\n\\n<calls>' -}}{%- for call in message.tool_calls -%}"
    "{{- '\\n<invoke name=\"' ~ call.function.name ~ '\">' -}}{%- for key, value in call.function.arguments.items() -%}"
    "{{- '\\n<argument name=\"' ~ key ~ '\" string=\"' ~ ('true\">' ~ value if value is string else 'false\">' ~ value | tojson)"
    " ~ '</argument>' -}}{%- endfor -%}{{- '\\n</invoke>' -}}{%- endfor -%}{{- '\\n</calls>' -}}{%- endif -%}"
)
LLAMA_JSON = (
    "{%- if tools -%}{{ tools | tojson }}{%- endif -%}" + LOOP + "{{- '<|start|>' ~ message.role ~ '<|sep|>\\n\\n' -}}"
    "{%- if message.tool_calls -%}{%- if message.tool_calls | length != 1 -%}{{ raise_exception('one call only') }}{%- endif -%}"
    "{%- set f = message.tool_calls[0].function -%}"
    "{{- '{\"name\": \"' ~ f.name ~ '\", \"parameters\": ' ~ f.arguments | tojson ~ '}' -}}"
    "{%- else -%}{{ message.content }}{%- endif -%}{{- '<|eot_id|>' -}}" + END + "{%- if add_generation_prompt -%}"
    "{{- '<|start|>assistant<|sep|>\\n\\n' -}}{%- endif -%}"
)
PYTHONIC_CALLS = (
    "{%- for call in message.tool_calls -%}{{- call.function.name ~ '(' -}}"
    "{%- for key, value in call.function.arguments.items() -%}{{- key ~ '=' ~ value | tojson -}}"
    "{%- if not loop.last -%}, {% endif -%}{%- endfor -%}){%- if not loop.last -%}, {% endif -%}{%- endfor -%}"
)
PYTHONIC = chatml("{{ message.content }}{%- if message.tool_calls -%}[" + PYTHONIC_CALLS + "]{%- endif -%}")
LFM2 = chatml(
    "{{ message.content }}{%- if message.tool_calls -%}<|tool_call_start|>[" + PYTHONIC_CALLS + "]<|tool_call_end|>{%- endif -%}"
)
MISTRAL = (
    "{{ bos_token }}{%- if tools -%}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{%- endif -%}"
    + LOOP
    + "{%- if message.role == 'user' -%}{{ '[INST] ' ~ message.content ~ '[/INST]' }}"
    "{%- elif message.role == 'tool' -%}{{ '[TOOL_RESULTS] ' ~ message.content ~ '[/TOOL_RESULTS]' }}"
    "{%- elif message.tool_calls -%}{{ '[TOOL_CALLS] [' }}"
    + CALLS
    + "{%- if call.id | length != 9 -%}{{ raise_exception('ids have 9 letters') }}{%- endif -%}"
    '{{ \'{"name": "\' ~ f.name ~ \'", "arguments": \' ~ f.arguments | tojson ~ \', "id": "\' ~ call.id ~ \'"}\' }}'
    "{%- if not loop.last -%}, {% endif -%}{%- endfor -%}]</s>{%- else -%}{{ ' ' ~ message.content ~ '</s>' }}{%- endif -%}" + END
)
MISTRAL_ARGS = (
    LOOP + "{%- if message.role == 'user' -%}{{ '[INST]' ~ message.content ~ '[/INST]' }}"
    "{%- elif message.role == 'tool' -%}{{ '[TOOL_RESULTS]' ~ message.content ~ '[/TOOL_RESULTS]' }}"
    "{%- else -%}{{ message.content }}" + CALLS + "{{ '[TOOL_CALLS]' ~ f.name ~ '[ARGS]' ~ f.arguments }}{%- endfor -%}</s>"
    "{%- endif -%}" + END
)
FENCED = chatml(
    "{%- if message.tool_calls and message.content is not none -%}{{ raise_exception('calls have no content') }}{%- endif -%}"
    "{{ message.content or '' }}{%- if message.tool_calls -%}<calls>" + CALLS + "{{- '\\n' if loop.index0 else '' -}}"
    "{{- '<call>function<name>' ~ f.name ~ '\\n```json\\n' ~ f.arguments | tojson ~ '\\n```</call>' -}}"
    "{%- endfor -%}</calls>{%- endif -%}"
)
KIMI = chatml(
    "{{ message.content }}{%- if message.tool_calls -%}<|section|>{%- for call in message.tool_calls -%}"
    "{{- '<|call|>' ~ call.id ~ '<|args|>' ~ call.function.arguments | tojson ~ '<|done|>' -}}"
    "{%- endfor -%}<|section_end|>{%- endif -%}"
)
LISTED = chatml(
    "{{ message.content }}{%- if message.tool_calls -%}functools["
    + CALLS
    + "{{- '{\"name\": \"' ~ f.name ~ '\", \"arguments\": ' ~ f.arguments | tojson ~ '}' -}}"
    "{%- if not loop.last -%}, {% endif -%}{%- endfor -%}]{%- endif -%}"
)
MARKED_CONTENT = chatml(
    "{{ '<|think|>' ~ message.reasoning ~ '<|done|>' if message.reasoning else '' }}{%- if message.tool_calls -%}<|action|>["
    + CALLS
    + '{{- \'\\n{"call_id": "\' ~ loop.index0 ~ \'", "tool": "\' ~ f.name -}}'
    + "{{- '\", \"parameters\": ' ~ f.arguments | tojson ~ '}' -}}"
    "{%- if not loop.last -%},{%- endif -%}{%- endfor -%}{{- '\\n]<|/action|>' -}}{%- else -%}"
    "{{- '<|say|>' ~ message.content ~ '<|/say|>' -}}{%- endif -%}"
)
HARMONY = (
    "{%- if tools -%}{{ tools | tojson }}{%- endif -%}" + LOOP + "{%- if message.role == 'assistant' -%}"
    "{%- if message.thinking -%}"
    "{{- '<|start|>assistant<|channel|>analysis<|message|>' ~ message.thinking ~ '<|end|>' -}}{%- endif -%}"
    "{%- if message.tool_calls -%}{{- '<|start|>assistant to=functions.' ~ message.tool_calls[0].function.name ~ "
    "'<|channel|>commentary json<|message|>' ~ message.tool_calls[0].function.arguments | tojson ~ '<|call|>' -}}"
    "{%- else -%}{{- '<|start|>assistant<|channel|>final<|message|>' ~ message.content ~ '<|return|>' -}}{%- endif -%}"
    "{%- else -%}{{- '<|start|>' ~ message.role ~ '<|message|>' ~ message.content ~ '<|end|>' -}}{%- endif -%}"
    + END
    + "{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}"
)
NO_TOOLS = (
    LOOP
    + "{{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' -}}"
    + END
    + "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
TOOLS_UNSEEN_IN_HISTORY = TOOLS + NO_TOOLS
REFUSES = "{{ raise_exception('never') }}"
