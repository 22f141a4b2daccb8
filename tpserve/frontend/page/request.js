// What is sent: the settings as fields of a chat completion, and the same request as curl and as Python.

const OPENAI_FIELDS = new Set(["model", "messages", "temperature", "top_p", "max_tokens", "seed", "presence_penalty", "frequency_penalty",
  "stop", "response_format", "tools", "tool_choice", "logprobs", "top_logprobs", "stream", "stream_options"]);
const TOP_LOGPROBS = 5;

class SettingError extends Error {}

/** A JSON field of the settings, or undefined when it is empty. SettingError marks the field and says what is wrong. */
function jsonSetting(id, isRight, expected) {
  const field = $(id);
  const text = field.value.trim();
  let value;
  let wrong = "";
  if (text) {
    try {
      value = JSON.parse(text);
      if (!isRight(value)) wrong = `This must be ${expected}.`;
    } catch (error) {
      wrong = `This is no JSON: ${error.message}`;
    }
  }
  field.toggleAttribute("aria-invalid", Boolean(wrong));
  if (wrong) field.setAttribute("aria-invalid", "true");
  setText($(`${id}-error`), wrong);
  show($(`${id}-error`), wrong);
  if (!wrong) return value;
  openSettings(true);
  field.focus();
  throw new SettingError(wrong);
}

/** The fields that the settings add to a request. */
function settingFields() {
  const fields = {};
  for (const input of document.querySelectorAll("[data-field]")) {
    const { field } = input.dataset;
    const text = input.value.trim();
    if (input.validity.badInput || !text) continue;
    if (field === "stop") fields.stop = input.value.split("\n").filter(Boolean);
    else if (field === "enable_thinking") fields.chat_template_kwargs = { enable_thinking: text === "true" };
    else fields[field] = input.type === "number" ? Number(text) : text;
  }
  const schema = jsonSetting("schema", value => value !== null && typeof value === "object" && !Array.isArray(value), "a JSON object");
  if (schema) fields.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
  const tools = jsonSetting("tools", Array.isArray, "a JSON list");
  if (tools?.length) fields.tools = tools;
  else delete fields.tool_choice;
  if ($("show-tokens").checked) Object.assign(fields, { logprobs: true, top_logprobs: TOP_LOGPROBS });
  return fields;
}

/** A message of the conversation as the API takes it; null for one that holds nothing. */
function apiMessage(message) {
  const { role, content, reasoning, calls } = message;
  if (role === "tool") return { role, tool_call_id: message.callId, content };
  if (role === "assistant" && calls?.length) {
    const history = reasoning ? { reasoning_content: reasoning } : {};
    return { role, content: content || null, ...history, tool_calls: calls };
  }
  return content ? { role, content } : null;
}

function requestBody(messages) {
  const system = $("system").value.trim() ? [{ role: "system", content: $("system").value }] : [];
  return { model: $("model").value || "default", messages: [...system, ...messages.map(apiMessage).filter(Boolean)], ...settingFields() };
}

function curlText(body) {
  const quoted = JSON.stringify({ ...body, stream: true }, null, 2).replaceAll("'", "'\\''");
  const key = keys.api ? ` \\\n  -H "Authorization: Bearer $TPSERVE_API_KEY"` : "";
  return `curl -N '${BASE}v1/chat/completions' \\\n  -H 'Content-Type: application/json'${key} \\\n  -d '${quoted}'\n`;
}

function pythonText(body) {
  const own = Object.fromEntries(Object.entries(body).filter(([name]) => !OPENAI_FIELDS.has(name)));
  const known = Object.entries(body).filter(([name]) => OPENAI_FIELDS.has(name));
  const lines = known.map(([name, value]) => `    ${name}=${pythonValue(value, "    ")},`);
  if (Object.keys(own).length) lines.push(`    extra_body=${pythonValue(own, "    ")},`);
  return `import os

from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(`${BASE}v1`)}, api_key=os.environ.get("TPSERVE_API_KEY", "none"))
stream = client.chat.completions.create(
${lines.join("\n")}
    stream=True,
)
for chunk in stream:
    if chunk.choices and chunk.choices[0].delta.content:
        print(chunk.choices[0].delta.content, end="", flush=True)
print()
`;
}

/** A JSON value as a Python literal. */
function pythonValue(value, indent) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const deeper = `${indent}    `;
  const isList = Array.isArray(value);
  const parts = isList ? value.map(each => pythonValue(each, deeper))
    : Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}: ${pythonValue(each, deeper)}`);
  const [open, close] = isList ? "[]" : "{}";
  return parts.length ? `${open}\n${parts.map(part => `${deeper}${part},`).join("\n")}\n${indent}${close}` : open + close;
}
